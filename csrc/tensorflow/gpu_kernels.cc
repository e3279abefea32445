// The op kernels for a GPU. They pass TensorFlow's stream and device memory to the launchers of
// cuda/center_loss_cuda.h; the CUDA runtime is not included here.
//
// Nothing here waits for the device, so a label out of range or an invalid alpha cannot raise an
// error; center_loss_cuda.h says what happens instead.

#include <algorithm>
#include <memory>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "csrc/tensorflow/step_ops.h"
#include "cuda/center_loss_cuda.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/util/determinism.h"
#include "xla/stream_executor/stream.h"

namespace tcl {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// The tests compile this file for the CPU, with the emulated launchers of tests/emulator.
#if !defined(TCL_GPU_DEVICE)
#define TCL_GPU_DEVICE tensorflow::DEVICE_GPU
#endif

void* StreamOf(OpKernelContext* context) {
  const auto* const device = context->op_device_context();
  return device == nullptr ? nullptr : device->stream()->platform_specific_handle().stream;
}

absl::Status ToStatus(int error, const char* what) {
  if (error == 0) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(what, ": CUDA error ", error, ", ", CudaErrorText(error)));
}

// The workspace of one op kernel. Its launches are on one stream, so they use the workspace one
// after another. It is reallocated when a batch needs more.
class Workspace {
 public:
  template <typename LaunchStep>
  absl::Status With(OpKernelContext* context, CudaWorkspace wanted, LaunchStep launch) {
    absl::MutexLock lock(mutex_);
    if (wanted.batch > sizes_.batch || wanted.dim > sizes_.dim || sizes_.memory == nullptr) {
      wanted.batch = std::max(wanted.batch, sizes_.batch);
      wanted.dim = std::max(wanted.dim, sizes_.dim);
      const int64_t bytes = CudaWorkspaceBytes(wanted);
      Tensor memory;
      TF_RETURN_IF_ERROR(
          context->allocate_temp(tensorflow::DT_UINT8, TensorShape({bytes}), &memory));
      wanted.memory = memory.data();
      TF_RETURN_IF_ERROR(
          ToStatus(ZeroOnCuda(wanted.memory, bytes, StreamOf(context)), "clearing the workspace"));
      memory_ = memory;
      sizes_ = wanted;
    }
    return launch(sizes_);
  }

 private:
  absl::Mutex mutex_;
  Tensor memory_ ABSL_GUARDED_BY(mutex_);
  CudaWorkspace sizes_ ABSL_GUARDED_BY(mutex_);
};

template <typename T, typename LabelType>
class GpuBackend {
 public:
  using Element = T;
  using Label = LabelType;
  using Center = CenterOf<T>;
  struct Arguments : StepArguments<typename FeatureOf<T>::type, Label> {
    CudaOptions<Center> cuda;
  };

  explicit GpuBackend(OpKernelConstruction* context) {
    if (!context->HasAttr("atomic")) return;
    OP_REQUIRES_OK(context, context->GetAttr("atomic", &atomic_));
    OP_REQUIRES(context, !(atomic_ && tensorflow::OpDeterminismRequired()),
                absl::FailedPreconditionError(
                    "atomic: expected False under op determinism "
                    "(tf.config.experimental.enable_op_determinism), got True: sums by atomics "
                    "depend on the order of the threads"));
  }

  static void SetLossWeight(const Tensor& loss_weight, Arguments* step) {
    step->cuda.loss_weight = loss_weight.scalar<Center>().data();
  }

  static void SetAlpha(const Tensor& alpha, Arguments* step) {
    step->cuda.alpha = alpha.scalar<Center>().data();
  }

  static absl::Status Copy(OpKernelContext* context, const Tensor& table, Tensor* copy) {
    TF_RETURN_IF_ERROR(context->allocate_temp(table.dtype(), table.shape(), copy));
    return ToStatus(CopyOnCuda(copy->data(), table.data(), static_cast<int64_t>(table.TotalBytes()),
                               StreamOf(context)),
                    "copying the centers");
  }

  static absl::Status Allocate(OpKernelContext* context, int output, const TensorShape& shape,
                               Tensor* tensor) {
    return context->allocate_temp(context->expected_output_dtype(output), shape, tensor);
  }

  absl::Status Launch(OpKernelContext* context, Arguments& step) {
    if (step.batch > kMostCudaSamples) {
      return absl::InvalidArgumentError(absl::StrCat(
          "features: expected at most ", kMostCudaSamples, " samples on a GPU, got ", step.batch));
    }
    step.cuda.atomic = atomic_;
    CudaWorkspace sizes;
    sizes.batch = step.batch;
    sizes.dim = step.dim;
    sizes.center_size = sizeof(Center);
    sizes.atomic = atomic_;
    return workspace_.With(context, sizes, [&](const CudaWorkspace& workspace) {
      return ToStatus(CenterLossOnCuda<typename FeatureOf<T>::type, Label>(
                          step, step.cuda, workspace, StreamOf(context)),
                      "launching the center loss step");
    });
  }

 private:
  bool atomic_ = false;
  Workspace workspace_;
};

template <typename T>
class GpuBackwardOp : public BackwardOp {
 public:
  using Center = CenterOf<T>;
  using BackwardOp::BackwardOp;

  void Compute(OpKernelContext* context) override {
    const ProfiledKernel profiled(*this, *context);
    Inputs in;
    OP_REQUIRES_OK(context, Find(context, &in));
    const Tensor& bits = *in.bits;
    if (std::is_same<T, Center>::value && in.upstream == nullptr) {
      OP_REQUIRES_OK(context, SetGradient<T>(context, bits));
      return;
    }
    Tensor gradient;
    // If no other tensor shares the scaled residual's buffer, the gradient is written into it. The
    // kernel then has nothing to write where upstream is 1, a value that only the device knows.
    std::unique_ptr<Tensor> forwarded;
    if (std::is_same<T, Center>::value) {
      forwarded = context->forward_input(0, OpKernelContext::Params::kNoReservation, bits.dtype(),
                                         bits.shape(), context->output_memory_type(0),
                                         tensorflow::AllocatorAttributes());
    }
    if (forwarded != nullptr) {
      OP_REQUIRES_OK(context, gradient.BitcastFrom(*forwarded, tensorflow::DataTypeToEnum<T>::v(),
                                                   forwarded->shape()));
    } else {
      OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DataTypeToEnum<T>::v(),
                                                     bits.shape(), &gradient));
    }
    context->set_output(0, gradient);
    using Feature = typename FeatureOf<T>::type;
    OP_REQUIRES_OK(context, ToStatus(BackwardOnCuda<Feature>(
                                         in.template factors<Center>(), in.per_sample(),
                                         static_cast<const Center*>(bits.data()),
                                         static_cast<Feature*>(gradient.data()), bits.dim_size(0),
                                         bits.dim_size(1), StreamOf(context)),
                                     "launching the backward pass"));
  }
};

#define TCL_REGISTER_GPU(T) TCL_REGISTER(TCL_GPU_DEVICE, GpuBackend, GpuBackwardOp, T)
TCL_REGISTER_GPU(float)
TCL_REGISTER_GPU(double)
TCL_REGISTER_GPU(Eigen::half)
TCL_REGISTER_GPU(Eigen::bfloat16)

}  // namespace
}  // namespace tcl
