// The ops under XLA (`jit_compile=True`): the step as a call of the CPU kernel (xla_cpu_call.cc) on
// the CPU, as HLO (xla_hlo.cc) on every other device; the backward pass as HLO everywhere. The
// centers move in the variable's own buffer.
//
// With TF_CENTER_LOSS_XLA_HLO=1 the CPU gets the other devices' form, which is how it is tested.

#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "csrc/names.h"
#include "csrc/tensorflow/xla_cpu_call.h"
#include "csrc/tensorflow/xla_hlo.h"
#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_compiler.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/shape_util.h"

namespace tcl {
namespace {

using tensorflow::DataType;
using tensorflow::DataTypeToPrimitiveType;
using tensorflow::OpKernelConstruction;
using tensorflow::TensorShape;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;
using xla::XlaOp;

class StepLowering : public XlaOpKernel {
 public:
  explicit StepLowering(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("Tcenters", &type_));
    OP_REQUIRES_OK(context, context->GetAttr("has_ignore_label", &kind_.has_ignore_label));
    int64_t ignore_label;
    OP_REQUIRES_OK(context, context->GetAttr("ignore_label", &ignore_label));
    kind_.ignore_label = ignore_label;
    std::string name;
    if (context->HasAttr("rule")) {
      OP_REQUIRES_OK(context, context->GetAttr("rule", &name));
      kind_.moves = ParseRule(name, &kind_.rule);
      OP_REQUIRES_OK(context, context->GetAttr("Talpha", &alpha_types_));
      OP_REQUIRES_OK(context, context->GetAttr("constant_alpha", &constant_alpha_));
    }
    if (context->HasAttr("reduction")) {
      OP_REQUIRES_OK(context, context->GetAttr("reduction", &name));
      kind_.has_loss = ParseReduction(name, &kind_.reduction);
      OP_REQUIRES_OK(context, context->GetAttr("Tweight", &weight_types_));
      OP_REQUIRES_OK(context, context->GetAttr("constant_weight", &constant_weight_));
      OP_REQUIRES_OK(context, context->GetAttr("Tsample_weight", &sample_weight_types_));
    }
    if (context->HasAttr("from_residual")) {
      OP_REQUIRES_OK(context, context->GetAttr("from_residual", &kind_.from_residual));
    }
  }

  void Compile(XlaOpKernelContext* context) override {
    StepOperands in;
    TensorShape table;
    OP_REQUIRES_OK(context, context->ReadVariableInput(0, type_, &table, &in.centers));
    OP_REQUIRES_OK(context, DataTypeToPrimitiveType(type_, &in.center_type));
    in.features = context->Input(1);
    in.labels = context->Input(2);
    const auto number = [&](float constant) {
      return xla::ConvertElementType(xla::ConstantR0<float>(context->builder(), constant),
                                     in.center_type);
    };
    int next = 3;
    in.alpha = alpha_types_.empty() ? number(constant_alpha_) : context->Input(next++);
    in.weight = weight_types_.empty() ? number(constant_weight_) : context->Input(next++);
    const int sample_weight = next;
    if (!sample_weight_types_.empty()) in.sample_weight = context->Input(next++);
    for (; next < context->num_inputs(); ++next) {
      const auto shape = context->InputXlaShape(next);
      OP_REQUIRES_OK(context, shape.status());
      // What is as large may be the table itself; of unknown size the call cannot take it.
      if (shape->is_static() && xla::ShapeUtil::ElementsIn(*shape) < table.num_elements()) {
        in.after.push_back(context->Input(next));
      }
    }
    OP_REQUIRES_OK(context, Bind(context, sample_weight, table, &in));

    StepResults out;
    if (OnCpu(context)) {
      out = StepOnCpu(kind_, in);
    } else {
      const auto hlo = StepInHlo(kind_, in);
      OP_REQUIRES_OK(context, hlo.status());
      out = *hlo;
    }
    if (kind_.moves) OP_REQUIRES_OK(context, context->AssignVariable(0, type_, out.centers));
    if (kind_.has_loss) {
      context->SetOutput(0, out.loss);
      context->SetOutput(1, out.residual_bits);
      context->SetOutput(2, out.squared_distance);
    }
  }

 private:
  // Shapes are checked here again because they may be unknown while tracing.
  absl::Status Bind(XlaOpKernelContext* context, int sample_weight, const TensorShape& table,
                    StepOperands* in) const {
    TF_ASSIGN_OR_RETURN(const xla::Shape features, context->InputXlaShape(1));
    TF_ASSIGN_OR_RETURN(const xla::Shape labels, context->InputXlaShape(2));
    if (features.dimensions().size() != 2) return Mismatch("features", features, "[B, D]");
    in->batch = features.dimensions(0);
    in->dim = features.dimensions(1);
    const std::string batch = absl::StrCat("[", in->batch, "]");
    if (labels.dimensions().size() != 1 || labels.dimensions(0) != in->batch) {
      return Mismatch("labels", labels, batch);
    }
    if (in->sample_weight) {
      TF_ASSIGN_OR_RETURN(const xla::Shape weights, context->InputXlaShape(sample_weight));
      if (weights.dimensions().size() != 1 || weights.dimensions(0) != in->batch) {
        return Mismatch("sample_weight", weights, batch);
      }
    }
    if (table.dims() != 2 || table.dim_size(1) != in->dim || table.dim_size(0) < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("centers: expected shape [C, ", in->dim, "], got ", table.DebugString()));
    }
    in->classes = table.dim_size(0);
    return absl::OkStatus();
  }

  static absl::Status Mismatch(const char* name, const xla::Shape& got,
                               const std::string& expected) {
    std::string shape;
    for (const int64_t dimension : got.dimensions()) {
      absl::StrAppend(&shape, shape.empty() ? "[" : ",", dimension);
    }
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": expected shape ", expected, ", got ", shape, "]"));
  }

  static bool OnCpu(XlaOpKernelContext* context) {
    const char* const hlo = std::getenv("TF_CENTER_LOSS_XLA_HLO");
    if (hlo != nullptr && std::string(hlo) == "1") return false;
    return context->compiler()->options().device_type.type_string() ==
           tensorflow::DEVICE_CPU_XLA_JIT;
  }

  DataType type_;
  StepKind kind_;
  tensorflow::DataTypeVector alpha_types_, weight_types_, sample_weight_types_;  // of none or one
  float constant_alpha_ = 0, constant_weight_ = 1;
};

class BackwardLowering : public XlaOpKernel {
 public:
  explicit BackwardLowering(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("T", &feature_type_));
    OP_REQUIRES_OK(context, context->GetAttr("Tcenters", &center_type_));
  }

  void Compile(XlaOpKernelContext* context) override {
    xla::PrimitiveType feature_type, center_type;
    OP_REQUIRES_OK(context, DataTypeToPrimitiveType(feature_type_, &feature_type));
    OP_REQUIRES_OK(context, DataTypeToPrimitiveType(center_type_, &center_type));
    XlaOp gradient = xla::BitcastConvertType(context->Input(0), center_type);
    std::vector<XlaOp> upstream;
    std::vector<TensorShape> shapes;
    OP_REQUIRES_OK(context, context->InputList("upstream", &upstream, &shapes));
    if (!upstream.empty()) {
      const auto residual = context->InputXlaShape(0);
      OP_REQUIRES_OK(context, residual.status());
      // One number for all rows, or one for each.
      const std::vector<int64_t> along(static_cast<size_t>(shapes[0].dims()), 0);
      gradient = xla::BroadcastInDim(upstream[0], residual->dimensions(), along) * gradient;
    }
    context->SetOutput(0, xla::ConvertElementType(gradient, feature_type));
  }

 private:
  DataType feature_type_, center_type_;
};

// Twice: what REGISTER_XLA_OP adds is looked at once, when the process first uses XLA, which may
// have been before this library was loaded.
#define TCL_REGISTER_XLA(OpName, Lowering)                                                 \
  REGISTER_XLA_OP(Name(OpName), Lowering);                                                 \
  REGISTER_KERNEL_BUILDER(Name(OpName).Device(tensorflow::DEVICE_CPU_XLA_JIT).Priority(1), \
                          Lowering);                                                       \
  REGISTER_KERNEL_BUILDER(Name(OpName).Device(tensorflow::DEVICE_GPU_XLA_JIT).Priority(1), \
                          Lowering);

TCL_REGISTER_XLA("TclCenterLossStep", StepLowering)
TCL_REGISTER_XLA("TclCenterLoss", StepLowering)
TCL_REGISTER_XLA("TclUpdateCenters", StepLowering)
TCL_REGISTER_XLA("TclCenterLossBackward", BackwardLowering)

}  // namespace
}  // namespace tcl
