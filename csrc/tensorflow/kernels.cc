// The op kernels for the CPU: TensorFlow's memory and threads around csrc/center_loss_cpu.h, and
// the kernel of TclZeros. The mathematics is in csrc/center_loss_cpu.cc.

#define EIGEN_USE_THREADS

#include <algorithm>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "csrc/tensorflow/cpu_step.h"
#include "csrc/tensorflow/huge_pages.h"
#include "csrc/tensorflow/step_ops.h"
#include "csrc/thread_pool.h"
#include "tensorflow/core/platform/threadpool.h"

namespace tcl {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// The rows of a smaller table stay in the caches and the TLB anyway.
constexpr int64_t kMinTableBytes = int64_t{1} << 26;

tensorflow::thread::ThreadPool* WorkerPool(OpKernelContext* context) {
  return context->device()->tensorflow_cpu_worker_threads()->workers;
}

// A ParallelFor on as many threads as the device's worker pool has. The threads that run the ops
// are used first: they are awake between two steps, whereas the worker threads sleep, and on waking
// displace an awake thread from its processor. The worker pool is the second choice, for a process
// with one thread for ops or with all of them busy.
ParallelFor DeviceThreads(OpKernelContext* context) {
  const auto schedule = [context](std::function<void()> task, bool retry) {
    if (retry) {
      WorkerPool(context)->Schedule(std::move(task));
    } else {
      (*context->runner())(std::move(task));
    }
  };
  return MakeParallelFor(schedule, WorkerPool(context)->NumThreads());
}

// Allocates a large array on huge pages and a smaller one by TensorFlow's allocator.
absl::Status AllocateArray(OpKernelContext* context, tensorflow::DataType dtype,
                           const TensorShape& shape, Tensor* tensor) {
  const int64_t bytes = shape.num_elements() * tensorflow::DataTypeSize(dtype);
  if (bytes < kMinBytesForHugePages || !HugePagesEnabled()) {
    return context->allocate_temp(dtype, shape, tensor);
  }
  *tensor = Tensor(HugePageAllocator(), dtype, shape);
  if (tensor->IsInitialized()) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("out of memory: could not allocate ", bytes,
                                                   " bytes for shape ", shape.DebugString(),
                                                   " of type ", tensorflow::DataTypeString(dtype)));
}

// Keeps the memory of an output from one step to the next and reuses it when no other tensor shares
// it. Memory returned to the system after each step would cause page faults in the next one, which
// take as long as writing the output. There are two buffers, because a training loop holds the
// results of one step while it runs the next.
class OutputBuffer {
 public:
  absl::Status Take(OpKernelContext* context, int output, const TensorShape& shape, Tensor* taken) {
    absl::MutexLock lock(mutex_);
    const auto reusable = [&shape](const Tensor& tensor) {
      return tensor.IsInitialized() && tensor.shape() == shape && tensor.RefCountIsOne();
    };
    if (!reusable(kept_[0])) std::swap(kept_[0], kept_[1]);
    if (!reusable(kept_[0])) {
      TF_RETURN_IF_ERROR(
          AllocateArray(context, context->expected_output_dtype(output), shape, &kept_[0]));
    }
    *taken = kept_[0];
    return absl::OkStatus();
  }

 private:
  absl::Mutex mutex_;
  Tensor kept_[2] ABSL_GUARDED_BY(mutex_);
};

template <typename T, typename LabelType>
class CpuBackend {
 public:
  using Element = T;
  using Label = LabelType;
  using Center = CenterOf<T>;
  using Arguments = StepArguments<typename FeatureOf<T>::type, Label>;

  explicit CpuBackend(OpKernelConstruction*) {}

  static void SetLossWeight(const Tensor& loss_weight, Arguments* step) {
    step->options.loss_weight = loss_weight.scalar<Center>()();
  }

  static void SetAlpha(const Tensor& alpha, Arguments* step) {
    step->options.alpha = alpha.scalar<Center>()();
  }

  static absl::Status Copy(OpKernelContext* context, const Tensor& table, Tensor* copy) {
    TF_RETURN_IF_ERROR(AllocateArray(context, table.dtype(), table.shape(), copy));
    std::memcpy(copy->data(), table.data(), table.TotalBytes());
    return absl::OkStatus();
  }

  absl::Status Allocate(OpKernelContext* context, int output, const TensorShape& shape,
                        Tensor* tensor) {
    return buffers_[output].Take(context, output, shape, tensor);
  }

  static absl::Status Launch(OpKernelContext* context, const Arguments& step) {
    // Moves the table to huge pages at the first step on this buffer. A checkpoint may have
    // replaced the buffer since the last step.
    const int64_t bytes = step.classes * step.dim * static_cast<int64_t>(sizeof(Center));
    if (step.options.update_centers && bytes >= kMinTableBytes && HugePagesEnabled() &&
        !MovedToHugePages(step.centers)) {
      MoveToHugePages(step.centers, bytes);
    }
    return StepOnCpu(step, DeviceThreads(context));
  }

 private:
  OutputBuffer buffers_[3];  // one per output
};

template <typename T>
class CpuBackwardOp : public BackwardOp {
 public:
  using Center = CenterOf<T>;
  using BackwardOp::BackwardOp;

  void Compute(OpKernelContext* context) override {
    const ProfiledKernel profiled(*this, *context);
    Inputs in;
    OP_REQUIRES_OK(context, Find(context, &in));
    const Tensor& bits = *in.bits;
    const Center* const factors = in.template factors<Center>();
    const Center one{1};
    if (std::is_same<T, Center>::value) {
      const int64_t given = factors == nullptr ? 0 : in.upstream->NumElements();
      if (std::all_of(factors, factors + given, [](Center factor) { return factor == 1; })) {
        OP_REQUIRES_OK(context, SetGradient<T>(context, bits));
        return;
      }
    }
    Tensor* gradient;
    OP_REQUIRES_OK(context, context->allocate_output(0, bits.shape(), &gradient));
    BackwardOnCpu<typename FeatureOf<T>::type>(
        factors == nullptr ? &one : factors, in.per_sample(),
        static_cast<const Center*>(bits.data()),
        static_cast<typename FeatureOf<T>::type*>(gradient->data()), bits.dim_size(0),
        bits.dim_size(1), DeviceThreads(context), BestIsa());
  }
};

template <typename T>
class ZerosOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    TensorShape shape;
    const auto sizes = context->input(0).flat<int64_t>();
    OP_REQUIRES_OK(context, TensorShape::BuildTensorShape(
                                absl::MakeConstSpan(sizes.data(), sizes.size()), &shape));
    const Tensor zeros(HugePageAllocator(), tensorflow::DataTypeToEnum<T>::v(), shape);
    OP_REQUIRES(context, zeros.IsInitialized(),
                absl::ResourceExhaustedError(absl::StrCat(
                    "shape: expected a table that fits into memory, got ", shape.DebugString())));
    context->set_output(0, zeros);
  }
};

#define TCL_ZEROS(T)                                          \
  REGISTER_KERNEL_BUILDER(Name("TclZeros")                    \
                              .Device(tensorflow::DEVICE_CPU) \
                              .HostMemory("shape")            \
                              .TypeConstraint<T>("dtype"),    \
                          ZerosOp<T>);
TCL_ZEROS(float)
TCL_ZEROS(double)

#define TCL_REGISTER_CPU(T) TCL_REGISTER(tensorflow::DEVICE_CPU, CpuBackend, CpuBackwardOp, T)
TCL_REGISTER_CPU(float)
TCL_REGISTER_CPU(double)
TCL_REGISTER_CPU(Eigen::half)
TCL_REGISTER_CPU(Eigen::bfloat16)

}  // namespace
}  // namespace tcl
