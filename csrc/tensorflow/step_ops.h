// The ops on TensorFlow's tensors, for any device: check, lock, pointers, launch, status.
//
// A Backend says what a device does its own way. It has the types Element (TensorFlow's, of the
// features), Label and Arguments (a StepArguments and whatever else Launch takes), and
//
//   SetWeight(tensor, arguments), SetAlpha(...)  a scalar of the centers' type
//   Copy(context, table, copy)                   another buffer with the table's numbers
//   AllocateResidual(context, shape, tensor)     memory for output 1
//   Launch(context, arguments)                   does the step

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_STEP_OPS_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_STEP_OPS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "csrc/center_loss.h"
#include "csrc/names.h"
#include "csrc/tensorflow/variable_access.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/register_types.h"
#include "tensorflow/core/framework/tensor.h"

namespace tcl {

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

inline absl::Status Mismatch(const char* name, const tensorflow::Tensor& got,
                             const std::string& expected) {
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": expected shape ", expected, ", got ", got.shape().DebugString()));
}

// What the ops have in common: their attributes, the checks of their arrays, the outputs. Shapes
// are checked here again because they may be unknown while tracing.
template <typename Backend>
class StepOp : public tensorflow::OpKernel {
 public:
  using T = typename Backend::Element;
  using Label = typename Backend::Label;
  using Feature = typename FeatureOf<T>::type;
  using Center = CenterOf<T>;
  using Context = tensorflow::OpKernelContext;
  using Tensor = tensorflow::Tensor;
  using TensorShape = tensorflow::TensorShape;
  using Arguments = typename Backend::Arguments;

  explicit StepOp(tensorflow::OpKernelConstruction* context)
      : OpKernel(context), backend_(context) {
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
  // Calls body(table) with the table locked for a step in place, in a buffer nobody else holds.
  template <typename Body>
  absl::Status WithWritableCenters(Context* context, Body body) {
    const auto own = [&](Tensor* table) {
      if (table->RefCountIsOne()) return absl::OkStatus();
      Tensor copy;
      TF_RETURN_IF_ERROR(backend_.Copy(context, *table, &copy));
      *table = copy;
      return absl::OkStatus();
    };
    return WithWritableVariable(context, 0, own, body);
  }

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

  absl::Status BindWeights(const Tensor& weight, const tensorflow::OpInputList& sample_weight,
                           Arguments* step) const {
    if (weight.dims() != 0) return Mismatch("weight", weight, "[]");
    TF_RETURN_IF_ERROR(backend_.SetWeight(weight, step));
    if (sample_weight.size() == 0) return absl::OkStatus();
    if (sample_weight[0].shape() != TensorShape({step->batch})) {
      return Mismatch("sample_weight", sample_weight[0], TensorShape({step->batch}).DebugString());
    }
    step->sample_weight = sample_weight[0].flat<Center>().data();
    return absl::OkStatus();
  }

  absl::Status BindAlpha(const Tensor& alpha, Arguments* step) const {
    if (alpha.dims() != 0) return Mismatch("alpha", alpha, "[]");
    step->options.update_centers = true;
    return backend_.SetAlpha(alpha, step);
  }

  // Residual and distances only where somebody takes them; in eager mode somebody may.
  absl::Status AllocateOutputs(Context* context, Arguments* step) {
    Tensor* loss;
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, step->options.reduction == Reduction::kNone ? TensorShape({step->batch}) : TensorShape(),
        &loss));
    step->loss = loss->flat<Center>().data();
    if (context->output_required(1)) {
      Tensor residual;
      TF_RETURN_IF_ERROR(
          backend_.AllocateResidual(context, TensorShape({step->batch, step->dim}), &residual));
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

  absl::Status Launch(Context* context, const Arguments& step) {
    return backend_.Launch(context, step);
  }

 private:
  StepOptions<Center> options_;
  Backend backend_;
};

template <typename Backend>
class CenterLossStepOp : public StepOp<Backend> {
 public:
  using StepOp<Backend>::StepOp;

  void Compute(tensorflow::OpKernelContext* context) override {
    tensorflow::OpInputList sample_weight;
    OP_REQUIRES_OK(context, context->input_list("sample_weight", &sample_weight));
    OP_REQUIRES_OK(context, this->WithWritableCenters(context, [&](tensorflow::Tensor* centers) {
      typename Backend::Arguments step;
      TF_RETURN_IF_ERROR(this->Bind(context->input(1), context->input(2), *centers, &step));
      TF_RETURN_IF_ERROR(this->BindWeights(context->input(3), sample_weight, &step));
      TF_RETURN_IF_ERROR(this->BindAlpha(context->input(4), &step));
      TF_RETURN_IF_ERROR(this->AllocateOutputs(context, &step));
      return this->Launch(context, step);
    }));
  }
};

template <typename Backend>
class CenterLossOp : public StepOp<Backend> {
 public:
  using StepOp<Backend>::StepOp;

  void Compute(tensorflow::OpKernelContext* context) override {
    tensorflow::OpInputList sample_weight;
    OP_REQUIRES_OK(context, context->input_list("sample_weight", &sample_weight));
    OP_REQUIRES_OK(
        context, WithReadableVariable(context, 0, [&](const tensorflow::Tensor* centers) {
          typename Backend::Arguments step;
          TF_RETURN_IF_ERROR(this->Bind(context->input(1), context->input(2), *centers, &step));
          TF_RETURN_IF_ERROR(this->BindWeights(context->input(3), sample_weight, &step));
          TF_RETURN_IF_ERROR(this->AllocateOutputs(context, &step));
          return this->Launch(context, step);
        }));
  }
};

template <typename Backend>
class UpdateCentersOp : public StepOp<Backend> {
 public:
  explicit UpdateCentersOp(tensorflow::OpKernelConstruction* context) : StepOp<Backend>(context) {
    OP_REQUIRES_OK(context, context->GetAttr("from_residual", &from_residual_));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    OP_REQUIRES_OK(context, this->WithWritableCenters(context, [&](tensorflow::Tensor* centers) {
      typename Backend::Arguments step;
      TF_RETURN_IF_ERROR(this->Bind(context->input(1), context->input(2), *centers, &step));
      TF_RETURN_IF_ERROR(this->BindAlpha(context->input(3), &step));
      step.features_are_residuals = from_residual_;
      return this->Launch(context, step);
    }));
  }

 private:
  bool from_residual_;
};

// The checks of a backward op's inputs: upstream [] or [B], residual bits [B, D].
inline absl::Status CheckBackward(const tensorflow::Tensor& upstream,
                                  const tensorflow::Tensor& bits) {
  if (bits.dims() != 2) return Mismatch("residual_bits", bits, "[B, D]");
  const int64_t batch = bits.dim_size(0);
  if (upstream.dims() == 0 || upstream.shape() == tensorflow::TensorShape({batch})) {
    return absl::OkStatus();
  }
  return Mismatch("upstream", upstream, absl::StrCat("[] or [", batch, "]"));
}

// The tests run the kernels of a GPU beside those of the CPU, under a label.
#if !defined(TCL_KERNEL_LABEL)
#define TCL_KERNEL_LABEL ""
#endif

// Registers a kernel for the features' type T and a type of labels; the kernel in parentheses.
#define TCL_UNPAREN(...) __VA_ARGS__
#define TCL_REGISTER_KERNEL(OpName, device, Kernel, T, L)               \
  REGISTER_KERNEL_BUILDER(Name(OpName)                                  \
                              .Device(device)                           \
                              .Label(TCL_KERNEL_LABEL)                  \
                              .HostMemory("centers")                    \
                              .TypeConstraint<T>("T")                   \
                              .TypeConstraint<L>("Tlabels")             \
                              .TypeConstraint<CenterOf<T>>("Tcenters"), \
                          TCL_UNPAREN Kernel);
#define TCL_REGISTER_LABEL(device, Backend, BackwardOp, T, Label)                                 \
  TCL_REGISTER_KERNEL("TclCenterLossStep", device, (CenterLossStepOp<Backend<T, Label>>), T,      \
                      Label)                                                                      \
  TCL_REGISTER_KERNEL("TclCenterLoss", device, (CenterLossOp<Backend<T, Label>>), T, Label)       \
  TCL_REGISTER_KERNEL("TclUpdateCenters", device, (UpdateCentersOp<Backend<T, Label>>), T, Label) \
  TCL_REGISTER_KERNEL("TclCenterLossBackward", device, (BackwardOp<T>), T, Label)
#define TCL_REGISTER(device, Backend, BackwardOp, T)          \
  TCL_REGISTER_LABEL(device, Backend, BackwardOp, T, int32_t) \
  TCL_REGISTER_LABEL(device, Backend, BackwardOp, T, int64_t)

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_STEP_OPS_H_
