// The ops on TensorFlow's tensors: check, lock, pointers, launch, status. The mathematics lies in
// csrc/center_loss_cpu.cc.

#define EIGEN_USE_THREADS

#include <cmath>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "csrc/center_loss.h"
#include "csrc/center_loss_cpu.h"
#include "csrc/names.h"
#include "csrc/tensorflow/variable_access.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/platform/threadpool.h"

namespace tcl {
namespace {

using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// TensorFlow's element type -> the kernels' (numeric_types.h); the 16-bit ones are layout twins.
template <typename T>
struct FeatureOf {
  using type = T;
};
template <>
struct FeatureOf<Eigen::half> {
  using type = Half;
};
template <>
struct FeatureOf<Eigen::bfloat16> {
  using type = BFloat16;
};

template <typename T>
using CenterOf = CenterType<typename FeatureOf<T>::type>;

ParallelFor ThreadsOf(OpKernelContext* context) {
  return [context](int64_t total, int64_t bytes, const Work& work) {
    if (total * bytes <= kMinBytesPerThread) return work(0, total);
    // Four bytes a cycle: what one core draws from memory.
    const auto adaptive = tensorflow::thread::ThreadPool::SchedulingParams::Adaptive(bytes / 4);
    context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(total, adaptive, work);
  };
}

// The memory of an op's largest output, kept from one step to the next and used again as soon as
// nobody else holds it. Given back to the system after each step, its pages would have to be
// faulted in anew, which takes as long as writing to them. Two of them, because a loop holds the
// gradient of one step while the next is made.
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
          Allocate(context, context->expected_output_dtype(output), shape, &kept_[0]));
    }
    *taken = kept_[0];
    return absl::OkStatus();
  }

 private:
  absl::Mutex mutex_;
  Tensor kept_[2] ABSL_GUARDED_BY(mutex_);
};

// What the ops have in common: their attributes, the checks of their arrays, the launch. Shapes
// are checked here again because they may be unknown while tracing.
template <typename T, typename Label>
class BatchOp : public OpKernel {
 public:
  using Feature = typename FeatureOf<T>::type;
  using Center = CenterOf<T>;

  explicit BatchOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("has_ignore_label", &options_.has_ignore_label));
    int64_t ignore_label;
    OP_REQUIRES_OK(context, context->GetAttr("ignore_label", &ignore_label));
    options_.ignore_label = ignore_label;
    std::string name;
    if (context->HasAttr("rule")) {
      OP_REQUIRES_OK(context, context->GetAttr("rule", &name));
      OP_REQUIRES(context, ParseRule(name, &options_.rule),
                  absl::InvalidArgumentError(absl::StrCat("rule: unknown rule '", name, "'")));
    }
    if (context->HasAttr("reduction")) {
      OP_REQUIRES_OK(context, context->GetAttr("reduction", &name));
      OP_REQUIRES(
          context, ParseReduction(name, &options_.reduction),
          absl::InvalidArgumentError(absl::StrCat("reduction: unknown reduction '", name, "'")));
    }
  }

  // On the thread that made its inputs: handing a small step to another takes longer than the step,
  // and a large one spreads over the threads by itself.
  bool IsExpensive() override { return false; }

 protected:
  using Arguments = StepArguments<Feature, Label>;

  absl::Status Bind(const Tensor& features, const Tensor& labels, const Tensor& centers,
                    Arguments* step) const {
    if (features.dims() != 2) return Mismatch("features", features, "[B, D]");
    const int64_t batch = features.dim_size(0), dim = features.dim_size(1);
    if (labels.shape() != TensorShape({batch})) {
      return Mismatch("labels", labels, TensorShape({batch}).DebugString());
    }
    if (centers.dtype() != tensorflow::DataTypeToEnum<Center>::v()) {
      return absl::InvalidArgumentError(
          absl::StrCat("centers: expected dtype ",
                       tensorflow::DataTypeString(tensorflow::DataTypeToEnum<Center>::v()),
                       ", got ", tensorflow::DataTypeString(centers.dtype())));
    }
    if (centers.dims() != 2 || centers.dim_size(1) != dim) {
      return Mismatch("centers", centers, absl::StrCat("[C, ", dim, "]"));
    }
    step->batch = batch;
    step->dim = dim;
    step->classes = centers.dim_size(0);
    step->features = reinterpret_cast<const Feature*>(features.flat<T>().data());
    step->labels = labels.flat<Label>().data();
    // Written only where options.update_centers says so, and then the variable is locked for it.
    step->centers = const_cast<Center*>(centers.flat<Center>().data());
    step->options = options_;
    step->options.update_centers = false;
    return absl::OkStatus();
  }

  static absl::Status BindWeights(const Tensor& weight, const OpInputList& sample_weight,
                                  Arguments* step) {
    if (weight.dims() != 0) return Mismatch("weight", weight, "[]");
    step->options.weight = weight.scalar<Center>()();
    if (sample_weight.size() == 0) return absl::OkStatus();
    if (sample_weight[0].shape() != TensorShape({step->batch})) {
      return Mismatch("sample_weight", sample_weight[0], TensorShape({step->batch}).DebugString());
    }
    step->sample_weight = sample_weight[0].flat<Center>().data();
    return absl::OkStatus();
  }

  static absl::Status BindAlpha(const Tensor& alpha, Arguments* step) {
    if (alpha.dims() != 0) return Mismatch("alpha", alpha, "[]");
    step->options.alpha = alpha.scalar<Center>()();
    step->options.update_centers = true;
    if (std::isfinite(step->options.alpha) && step->options.alpha >= 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("alpha: expected a finite number >= 0, got ", step->options.alpha));
  }

  // Residual and distances only where somebody takes them; in eager mode somebody may.
  absl::Status AllocateOutputs(OpKernelContext* context, Arguments* step) {
    Tensor* loss;
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, step->options.reduction == Reduction::kNone ? TensorShape({step->batch}) : TensorShape(),
        &loss));
    step->loss = loss->flat<Center>().data();
    if (context->output_required(1)) {
      Tensor residual;
      TF_RETURN_IF_ERROR(
          residual_buffer_.Take(context, 1, TensorShape({step->batch, step->dim}), &residual));
      context->set_output(1, residual);
      step->residual = static_cast<Center*>(residual.data());
    }
    if (context->output_required(2)) {
      Tensor* squared_distance;
      TF_RETURN_IF_ERROR(
          context->allocate_output(2, TensorShape({step->batch}), &squared_distance));
      step->squared_distance = squared_distance->flat<Center>().data();
    }
    return absl::OkStatus();
  }

  static absl::Status Launch(OpKernelContext* context, const Arguments& step) {
    const int64_t bad = CenterLossOnCpu(step, ThreadsOf(context), BestIsa());
    if (bad < 0) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("labels[", bad, "] = ", step.labels[bad],
                                                   " is outside [0, ", step.classes, ")"));
  }

 private:
  static absl::Status Mismatch(const char* name, const Tensor& got, const std::string& expected) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": expected shape ", expected, ", got ", got.shape().DebugString()));
  }

  StepOptions<Center> options_;
  OutputBuffer residual_buffer_;
};

template <typename T, typename Label>
class CenterLossStepOp : public BatchOp<T, Label> {
 public:
  using BatchOp<T, Label>::BatchOp;

  void Compute(OpKernelContext* context) override {
    OpInputList sample_weight;
    OP_REQUIRES_OK(context, context->input_list("sample_weight", &sample_weight));
    OP_REQUIRES_OK(
        context, WithWritableVariable(context, 0, [&](Tensor* centers) {
          typename BatchOp<T, Label>::Arguments step;
          TF_RETURN_IF_ERROR(this->Bind(context->input(1), context->input(2), *centers, &step));
          TF_RETURN_IF_ERROR(this->BindWeights(context->input(3), sample_weight, &step));
          TF_RETURN_IF_ERROR(this->BindAlpha(context->input(4), &step));
          TF_RETURN_IF_ERROR(this->AllocateOutputs(context, &step));
          return this->Launch(context, step);
        }));
  }
};

template <typename T, typename Label>
class CenterLossOp : public BatchOp<T, Label> {
 public:
  using BatchOp<T, Label>::BatchOp;

  void Compute(OpKernelContext* context) override {
    OpInputList sample_weight;
    OP_REQUIRES_OK(context, context->input_list("sample_weight", &sample_weight));
    OP_REQUIRES_OK(
        context, WithReadableVariable(context, 0, [&](const Tensor* centers) {
          typename BatchOp<T, Label>::Arguments step;
          TF_RETURN_IF_ERROR(this->Bind(context->input(1), context->input(2), *centers, &step));
          TF_RETURN_IF_ERROR(this->BindWeights(context->input(3), sample_weight, &step));
          TF_RETURN_IF_ERROR(this->AllocateOutputs(context, &step));
          return this->Launch(context, step);
        }));
  }
};

template <typename T, typename Label>
class UpdateCentersOp : public BatchOp<T, Label> {
 public:
  explicit UpdateCentersOp(OpKernelConstruction* context) : BatchOp<T, Label>(context) {
    OP_REQUIRES_OK(context, context->GetAttr("from_residual", &from_residual_));
  }

  void Compute(OpKernelContext* context) override {
    OP_REQUIRES_OK(
        context, WithWritableVariable(context, 0, [&](Tensor* centers) {
          typename BatchOp<T, Label>::Arguments step;
          TF_RETURN_IF_ERROR(this->Bind(context->input(1), context->input(2), *centers, &step));
          TF_RETURN_IF_ERROR(this->BindAlpha(context->input(3), &step));
          step.features_are_residuals = from_residual_;
          return this->Launch(context, step);
        }));
  }

 private:
  bool from_residual_;
};

template <typename T>
class CenterLossBackwardOp : public OpKernel {
 public:
  using Center = CenterOf<T>;
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& upstream = context->input(0);
    const Tensor& bits = context->input(1);
    OP_REQUIRES(context, bits.dims() == 2,
                absl::InvalidArgumentError(absl::StrCat(
                    "residual_bits: expected shape [B, D], got ", bits.shape().DebugString())));
    const int64_t batch = bits.dim_size(0), dim = bits.dim_size(1);
    const bool per_sample = upstream.dims() == 1;
    OP_REQUIRES(
        context, upstream.dims() == 0 || upstream.shape() == TensorShape({batch}),
        absl::InvalidArgumentError(absl::StrCat("upstream: expected shape [] or [", batch,
                                                "], got ", upstream.shape().DebugString())));
    const auto factors = upstream.flat<Center>();
    if (std::is_same<T, Center>::value) {
      bool all_one = true;
      for (int64_t i = 0; i < factors.size(); ++i) all_one &= factors(i) == Center{1};
      if (all_one) {
        Tensor gradient;
        OP_REQUIRES_OK(
            context, gradient.BitcastFrom(bits, tensorflow::DataTypeToEnum<T>::v(), bits.shape()));
        context->set_output(0, gradient);
        return;
      }
    }
    Tensor* gradient;
    OP_REQUIRES_OK(context, context->allocate_output(0, bits.shape(), &gradient));
    BackwardOnCpu<typename FeatureOf<T>::type>(
        factors.data(), per_sample, static_cast<const Center*>(bits.data()),
        static_cast<typename FeatureOf<T>::type*>(gradient->data()), batch, dim, ThreadsOf(context),
        BestIsa());
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

#define TCL_UNPAREN(...) __VA_ARGS__
#define TCL_REGISTER_ONE(OpName, Kernel, T, Label)                      \
  REGISTER_KERNEL_BUILDER(Name(OpName)                                  \
                              .Device(tensorflow::DEVICE_CPU)           \
                              .TypeConstraint<T>("T")                   \
                              .TypeConstraint<Label>("Tlabels")         \
                              .TypeConstraint<CenterOf<T>>("Tcenters"), \
                          TCL_UNPAREN Kernel);
#define TCL_REGISTER_LABEL(T, Label)                                            \
  TCL_REGISTER_ONE("TclCenterLossStep", (CenterLossStepOp<T, Label>), T, Label) \
  TCL_REGISTER_ONE("TclCenterLoss", (CenterLossOp<T, Label>), T, Label)         \
  TCL_REGISTER_ONE("TclUpdateCenters", (UpdateCentersOp<T, Label>), T, Label)   \
  TCL_REGISTER_ONE("TclCenterLossBackward", (CenterLossBackwardOp<T>), T, Label)
#define TCL_REGISTER(T)          \
  TCL_REGISTER_LABEL(T, int32_t) \
  TCL_REGISTER_LABEL(T, int64_t)

TCL_REGISTER(float)
TCL_REGISTER(double)
TCL_REGISTER(Eigen::half)
TCL_REGISTER(Eigen::bfloat16)

}  // namespace
}  // namespace tcl
