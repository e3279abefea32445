// The op kernels that the CPU and the GPU share: they check the inputs, lock the variable, allocate
// the outputs, collect the pointers in StepArguments and launch the step. Nothing here is specific
// to a device. kernels.cc and gpu_kernels.cc supply a Backend, which has
//
//   Element, Label                            the element types of features and labels
//   Arguments                                 StepArguments, and whatever else Launch needs
//   Backend(OpKernelConstruction*)            reads the attributes that only this device knows
//   SetLossWeight(tensor, arguments)          sets the loss weight from an input of shape []
//   SetAlpha(tensor, arguments)               sets alpha from an input of shape []
//   Copy(context, table, copy)                allocates a copy of the table
//   Allocate(context, output, shape, tensor)  allocates the memory of an output
//   Launch(context, arguments)                runs the step
//
// An op kernel has one Backend. TensorFlow may call Compute on several threads at a time, so all
// functions of a Backend are thread-safe.

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
#include "tsl/profiler/lib/traceme.h"

namespace tcl {

// Maps TensorFlow's element types to those of numeric_types.h, which have the same layout.
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

inline bool IsVector(const tensorflow::Tensor& tensor, int64_t size) {
  return tensor.dims() == 1 && tensor.dim_size(0) == size;
}

// Records a kernel in a profile while it runs. TensorFlow leaves inexpensive kernels out at the
// default level of detail.
class ProfiledKernel {
 public:
  ProfiledKernel(const tensorflow::OpKernel& kernel, const tensorflow::OpKernelContext& context)
      : trace_([&] { return kernel.TraceString(context, /*verbose=*/false); },
               tsl::profiler::TraceMeLevel::kInfo) {}

 private:
  tsl::profiler::TraceMe trace_;
};

// The op kernel of all ops except the backward pass. An op with the attribute `rule` updates the
// centers, and one with `reduction` computes a loss. With `from_residual`, features hold the
// residual of an earlier forward pass. Input 0 is the variable, 1 the features, 2 the labels.
// Shapes are checked at run time again, because they may be unknown at trace time.
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
    OP_REQUIRES_OK(context, context->GetAttr("has_ignore_class", &options_.has_ignore_class));
    int64_t ignore_class;
    OP_REQUIRES_OK(context, context->GetAttr("ignore_class", &ignore_class));
    options_.ignore_class = ignore_class;
    std::string name;
    float constant;
    options_.update_centers = context->HasAttr("rule");
    if (options_.update_centers) {
      OP_REQUIRES_OK(context, context->GetAttr("rule", &name));
      OP_REQUIRES(context, ParseRule(name, &options_.rule),
                  absl::InvalidArgumentError(UnknownRule(name)));
      OP_REQUIRES_OK(context, context->GetAttr("constant_alpha", &constant));
      options_.alpha = constant;
      OP_REQUIRES_OK(context, FindOptional("alpha", &alpha_));
    }
    has_loss_ = context->HasAttr("reduction");
    if (has_loss_) {
      OP_REQUIRES_OK(context, context->GetAttr("reduction", &name));
      OP_REQUIRES(context, ParseReduction(name, &options_.reduction),
                  absl::InvalidArgumentError(UnknownReduction(name)));
      OP_REQUIRES_OK(context, context->GetAttr("constant_loss_weight", &constant));
      options_.loss_weight = constant;
      OP_REQUIRES_OK(context, FindOptional("loss_weight", &loss_weight_));
      OP_REQUIRES_OK(context, FindOptional("sample_weight", &sample_weight_));
    }
    if (context->HasAttr("from_residual")) {
      OP_REQUIRES_OK(context, context->GetAttr("from_residual", &from_residual_));
    }
  }

  void Compute(Context* context) override {
    const ProfiledKernel profiled(*this, *context);
    const auto run = [&](const Tensor* centers) { return Run(context, *centers); };
    OP_REQUIRES_OK(context, options_.update_centers ? WithWritableCenters(context, run)
                                                    : WithReadableVariable(context, 0, run));
  }

  // The executor runs an inexpensive kernel on the current thread. Handing a small step to another
  // thread takes longer than the step, and a large step uses several threads anyway.
  bool IsExpensive() override { return false; }

 private:
  // Finds an optional input, which is a list of length 0 or 1. Its index stays -1 if it is absent.
  absl::Status FindOptional(const char* name, int* index) {
    int begin, end;
    TF_RETURN_IF_ERROR(InputRange(name, &begin, &end));
    if (begin == end) return absl::OkStatus();
    *index = begin;
    const tensorflow::DataType expected = tensorflow::DataTypeToEnum<Center>::v();
    if (end == begin + 1 && input_type(begin) == expected) return absl::OkStatus();
    const tensorflow::DataTypeSlice types(&input_types()[begin], end - begin);
    return absl::InvalidArgumentError(absl::StrCat(name, ": expected one input of type ",
                                                   tensorflow::DataTypeString(expected), ", got [",
                                                   tensorflow::DataTypeSliceString(types), "]"));
  }

  // Locks the variable for writing and calls body(table). If another tensor shares the table's
  // buffer, the table is first copied, so that the step does not write into that tensor.
  template <typename Body>
  absl::Status WithWritableCenters(Context* context, Body body) {
    const auto unshare = [&](Tensor* table) {
      if (table->RefCountIsOne()) return absl::OkStatus();
      Tensor copy;
      TF_RETURN_IF_ERROR(backend_.Copy(context, *table, &copy));
      *table = copy;
      return absl::OkStatus();
    };
    return WithWritableVariable(context, 0, unshare, body);
  }

  absl::Status Run(Context* context, const Tensor& centers) {
    Arguments step;
    TF_RETURN_IF_ERROR(Bind(context->input(1), context->input(2), centers, &step));
    if (alpha_ >= 0) {
      const Tensor& alpha = context->input(alpha_);
      if (alpha.dims() != 0) return Mismatch("alpha", alpha, "[]");
      backend_.SetAlpha(alpha, &step);
    }
    if (has_loss_) {
      TF_RETURN_IF_ERROR(BindWeights(context, &step));
      TF_RETURN_IF_ERROR(AllocateOutputs(context, &step));
    }
    return backend_.Launch(context, step);
  }

  absl::Status Bind(const Tensor& features, const Tensor& labels, const Tensor& centers,
                    Arguments* step) const {
    if (features.dims() != 2) return Mismatch("features", features, "[B, D]");
    const int64_t batch = features.dim_size(0), dim = features.dim_size(1);
    if (!IsVector(labels, batch)) {
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
    // Written only if options.update_centers, and then the variable is locked for writing.
    step->centers = const_cast<Center*>(centers.flat<Center>().data());
    step->features_are_residuals = from_residual_;
    step->options = options_;
    return absl::OkStatus();
  }

  absl::Status BindWeights(Context* context, Arguments* step) const {
    if (loss_weight_ >= 0) {
      const Tensor& loss_weight = context->input(loss_weight_);
      if (loss_weight.dims() != 0) return Mismatch("loss_weight", loss_weight, "[]");
      backend_.SetLossWeight(loss_weight, step);
    }
    if (sample_weight_ >= 0) {
      const Tensor& sample_weight = context->input(sample_weight_);
      if (!IsVector(sample_weight, step->batch)) {
        return Mismatch("sample_weight", sample_weight, TensorShape({step->batch}).DebugString());
      }
      step->sample_weight = sample_weight.flat<Center>().data();
    }
    return absl::OkStatus();
  }

  // Allocates scaled residual and distances only if they are used. In eager mode all outputs count
  // as used.
  absl::Status AllocateOutputs(Context* context, Arguments* step) {
    const auto allocate = [&](int output, const TensorShape& shape, Center** memory) {
      Tensor tensor;
      TF_RETURN_IF_ERROR(backend_.Allocate(context, output, shape, &tensor));
      *memory = static_cast<Center*>(tensor.data());
      context->set_output(output, tensor);
      return absl::OkStatus();
    };
    const bool per_sample = step->options.reduction == Reduction::kNone;
    const TensorShape loss_shape = per_sample ? TensorShape({step->batch}) : TensorShape();
    TF_RETURN_IF_ERROR(allocate(0, loss_shape, &step->loss));
    if (context->output_required(1)) {
      TF_RETURN_IF_ERROR(allocate(1, TensorShape({step->batch, step->dim}), &step->residual));
    }
    if (context->output_required(2)) {
      TF_RETURN_IF_ERROR(allocate(2, TensorShape({step->batch}), &step->squared_distance));
    }
    return absl::OkStatus();
  }

  StepOptions<Center> options_;
  bool has_loss_ = false;
  bool from_residual_ = false;
  int alpha_ = -1, loss_weight_ = -1, sample_weight_ = -1;  // indices of optional inputs
  Backend backend_;
};

// The base class of the backward op kernels: it finds their inputs and checks them.
class BackwardOp : public tensorflow::OpKernel {
 public:
  explicit BackwardOp(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    tensorflow::DataTypeVector types;
    OP_REQUIRES_OK(context, context->GetAttr("Tupstream", &types));
    has_upstream_ = !types.empty();
  }

  bool IsExpensive() override { return false; }  // as in StepOp

 protected:
  struct Inputs {
    // [B, D], the scaled residual, bitcast to an integer type (why: TCL_BITS_ATTR in ops.cc).
    const tensorflow::Tensor* bits;
    const tensorflow::Tensor* upstream;  // [] or [B]; null: the upstream gradient is 1

    template <typename Center>
    const Center* factors() const {
      return upstream == nullptr ? nullptr : upstream->flat<Center>().data();
    }
    bool per_sample() const { return upstream != nullptr && upstream->dims() == 1; }
  };

  absl::Status Find(tensorflow::OpKernelContext* context, Inputs* in) const {
    in->bits = &context->input(0);
    in->upstream = has_upstream_ ? &context->input(1) : nullptr;
    if (in->bits->dims() != 2) return Mismatch("residual_bits", *in->bits, "[B, D]");
    const int64_t batch = in->bits->dim_size(0);
    if (in->upstream == nullptr || in->upstream->dims() == 0 || IsVector(*in->upstream, batch)) {
      return absl::OkStatus();
    }
    return Mismatch("upstream", *in->upstream, absl::StrCat("[] or [", batch, "]"));
  }

  // Outputs the scaled residual's buffer as the gradient, without a copy. Valid if every number of
  // upstream is 1 and T is the type of the scaled residual.
  template <typename T>
  static absl::Status SetGradient(tensorflow::OpKernelContext* context,
                                  const tensorflow::Tensor& bits) {
    tensorflow::Tensor gradient;
    TF_RETURN_IF_ERROR(
        gradient.BitcastFrom(bits, tensorflow::DataTypeToEnum<T>::v(), bits.shape()));
    context->set_output(0, gradient);
    return absl::OkStatus();
  }

 private:
  bool has_upstream_;
};

// The tests register the GPU's op kernels for the CPU. TensorFlow's kernel label, a string,
// distinguishes them from the CPU's own op kernels.
#if !defined(TCL_KERNEL_LABEL)
#define TCL_KERNEL_LABEL ""
#endif

// Registers one op kernel for the features' type T and the labels' type L. The op kernel is in
// parentheses, because it may contain commas. `centers` is in host memory, because it is a handle
// of the variable and not its numbers.
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
#define TCL_REGISTER_LABEL(device, Backend, BackwardKernel, T, Label)                     \
  TCL_REGISTER_KERNEL("TclCenterLossStep", device, (StepOp<Backend<T, Label>>), T, Label) \
  TCL_REGISTER_KERNEL("TclCenterLoss", device, (StepOp<Backend<T, Label>>), T, Label)     \
  TCL_REGISTER_KERNEL("TclUpdateCenters", device, (StepOp<Backend<T, Label>>), T, Label)  \
  TCL_REGISTER_KERNEL("TclCenterLossBackward", device, (BackwardKernel<T>), T, Label)
#define TCL_REGISTER(device, Backend, BackwardKernel, T)          \
  TCL_REGISTER_LABEL(device, Backend, BackwardKernel, T, int32_t) \
  TCL_REGISTER_LABEL(device, Backend, BackwardKernel, T, int64_t)

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_STEP_OPS_H_
