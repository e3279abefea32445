// The ops on the CPU. The mathematics lies in csrc/center_loss_cpu.cc.

#define EIGEN_USE_THREADS

#include <algorithm>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "csrc/thread_pool.h"
#include "csrc/tensorflow/cpu_step.h"
#include "csrc/tensorflow/huge_pages.h"
#include "csrc/tensorflow/step_ops.h"
#include "tensorflow/core/platform/threadpool.h"

namespace tcl {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// Caches and the translation buffer hold the rows of a smaller table anyway.
constexpr int64_t kMinTableBytes = int64_t{1} << 26;

tensorflow::thread::ThreadPool* PoolOf(OpKernelContext* context) {
  return context->device()->tensorflow_cpu_worker_threads()->workers;
}

// As many threads as the device's pool has, but first of all those that run the ops: between two
// steps they are awake. Those of the pool have fallen asleep and, woken, push one that is awake
// from its processor. But there may be one thread for ops only, or all may be busy.
ParallelFor ThreadsOf(OpKernelContext* context) {
  const auto schedule = [context](std::function<void()> task, bool again) {
    if (again) {
      PoolOf(context)->Schedule(std::move(task));
    } else {
      (*context->runner())(std::move(task));
    }
  };
  return MakeParallelFor(schedule, PoolOf(context)->NumThreads());
}

// Large arrays on large pages.
absl::Status AllocateArray(OpKernelContext* context, tensorflow::DataType dtype,
                           const TensorShape& shape, Tensor* tensor) {
  const int64_t bytes = shape.num_elements() * tensorflow::DataTypeSize(dtype);
  if (bytes < kMinBytesForHugePages || !HugePagesWanted()) {
    return context->allocate_temp(dtype, shape, tensor);
  }
  *tensor = Tensor(HugePageAllocator(), dtype, shape);
  if (tensor->IsInitialized()) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("no memory for ", shape.DebugString(), " ", tensorflow::DataTypeString(dtype)));
}

// The memory of an output, kept from one step to the next and used again as soon as nobody else
// holds it. Given back to the system after each step, the pages of a large one would have to be
// faulted in anew, which takes as long as writing to them. Two of them, because a loop holds the
// results of one step while the next is made.
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
class OnCpu {
 public:
  using Element = T;
  using Label = LabelType;
  using Center = CenterOf<T>;
  using Arguments = StepArguments<typename FeatureOf<T>::type, Label>;

  explicit OnCpu(OpKernelConstruction*) {}

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
    // At the first step; a gather may have come before, or a checkpoint changed the buffer since.
    const int64_t bytes = step.classes * step.dim * static_cast<int64_t>(sizeof(Center));
    if (step.options.update_centers && bytes >= kMinTableBytes && HugePagesWanted() &&
        !MovedToHugePages(step.centers)) {
      MoveToHugePages(step.centers, bytes);
    }
    return StepOnCpu(step, ThreadsOf(context));
  }

 private:
  OutputBuffer buffers_[3];  // for each output
};

template <typename T>
class BackwardOnCpuOp : public BackwardOp {
 public:
  using Center = CenterOf<T>;
  using BackwardOp::BackwardOp;

  void Compute(OpKernelContext* context) override {
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
        bits.dim_size(1), ThreadsOf(context), BestIsa());
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
                absl::ResourceExhaustedError(
                    absl::StrCat("no memory for a table of shape ", shape.DebugString())));
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

#define TCL_REGISTER_CPU(T) TCL_REGISTER(tensorflow::DEVICE_CPU, OnCpu, BackwardOnCpuOp, T)
TCL_REGISTER_CPU(float)
TCL_REGISTER_CPU(double)
TCL_REGISTER_CPU(Eigen::half)
TCL_REGISTER_CPU(Eigen::bfloat16)

}  // namespace
}  // namespace tcl
