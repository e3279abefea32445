// The lowerings of the ops to XLA (`jit_compile=True`). The step becomes a custom call of the
// device's kernel (xla_call.h). The backward pass becomes HLO, which XLA can fuse. Nothing is
// computed here.
//
// The step updates the centers in the variable's buffer. XLA orders operations by data dependencies
// only, and copies the table for the step if a read of the table is not ordered with it. Therefore
// the results of earlier reads are unused operands of the call: the op's inputs `after`, which the
// Python package finds, and those that AddReadDependencies finds.

#include <algorithm>
#include <deque>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "csrc/names.h"
#include "csrc/tensorflow/xla_call.h"
#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_compiler.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/service/hlo.pb.h"
#include "xla/shape_util.h"

namespace tcl {
namespace {

using tensorflow::DataType;
using tensorflow::DataTypeToPrimitiveType;
using tensorflow::OpKernelConstruction;
using tensorflow::TensorShape;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;
using xla::ShapeUtil;
using xla::XlaOp;

// The instructions of a program under construction. They are a private member of XlaBuilder, which
// has no accessor for them. An explicit instantiation may name a private member.
std::deque<xla::HloInstructionProto>& InstructionsOf(xla::XlaBuilder& builder);
template <std::deque<xla::HloInstructionProto> xla::XlaBuilder::* kMember>
struct PrivateMember {
  friend std::deque<xla::HloInstructionProto>& InstructionsOf(xla::XlaBuilder& builder) {
    return builder.*kMember;
  }
};
template struct PrivateMember<&xla::XlaBuilder::instructions_>;

// True if the shape may contain the table.
bool HoldsTable(const xla::ShapeProto& shape, int64_t elements) {
  if (shape.element_type() == xla::TUPLE) return true;
  int64_t size = 1;
  for (const int64_t dimension : shape.dimensions()) size *= dimension;
  return size >= elements;
}

bool IsDynamic(const xla::ShapeProto& shape) {
  const auto& dynamic = shape.is_dynamic_dimension();
  return std::find(dynamic.begin(), dynamic.end(), true) != dynamic.end();
}

// Makes the last instruction, a step that overwrites its first operand, depend on the results of
// earlier reads of that operand, by adding them as operands. The op's inputs `after` lack the reads
// of a calling `tf.function`, which TensorFlow traces separately. (A control dependency would order
// them too, but it prevents XLA from rewriting a gather that its code generator cannot compile.)
//
// A value as large as the table, or of dynamic size, is not added. It counts as a table itself, so
// that values computed from it are added, such as the sum over the table or the result of a loop.
void AddReadDependencies(xla::XlaBuilder& builder, int64_t elements) {
  std::deque<xla::HloInstructionProto>& program = InstructionsOf(builder);
  xla::HloInstructionProto& step = program.back();
  std::unordered_set<int64_t> tables = {step.operand_ids(0)};
  for (const xla::HloInstructionProto& instruction : program) {
    if (&instruction == &step) break;
    const auto& operands = instruction.operand_ids();
    if (std::none_of(operands.begin(), operands.end(),
                     [&tables](int64_t id) { return tables.count(id) != 0; })) {
      continue;
    }
    if (HoldsTable(instruction.shape(), elements) || IsDynamic(instruction.shape())) {
      tables.insert(instruction.id());
    } else if (instruction.shape().element_type() != xla::TOKEN) {
      step.add_operand_ids(instruction.id());
      *step.add_operand_shapes_with_layout() = instruction.shape();
    }
  }
}

// The attributes of the custom call in MLIR's syntax.
std::string Attributes(const StepKind& kind) {
  const auto boolean = [](bool value) { return value ? "true" : "false"; };
  return absl::StrCat(
      "{rule = ", static_cast<int>(kind.rule),
      " : i32, reduction = ", static_cast<int>(kind.reduction),
      " : i32, has_ignore_class = ", boolean(kind.has_ignore_class),
      ", ignore_class = ", kind.ignore_class, " : i64, moves = ", boolean(kind.moves),
      ", has_loss = ", boolean(kind.has_loss), ", from_residual = ", boolean(kind.from_residual),
      ", weighted = ", boolean(kind.weighted), "}");
}

class StepLowering : public XlaOpKernel {
 public:
  explicit StepLowering(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("Tcenters", &type_));
    OP_REQUIRES_OK(context, context->GetAttr("has_ignore_class", &kind_.has_ignore_class));
    int64_t ignore_class;
    OP_REQUIRES_OK(context, context->GetAttr("ignore_class", &ignore_class));
    kind_.ignore_class = ignore_class;
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
      OP_REQUIRES_OK(context, context->GetAttr("Tloss_weight", &loss_weight_types_));
      OP_REQUIRES_OK(context, context->GetAttr("constant_loss_weight", &constant_loss_weight_));
      tensorflow::DataTypeVector sample_weight_types;
      OP_REQUIRES_OK(context, context->GetAttr("Tsample_weight", &sample_weight_types));
      kind_.weighted = !sample_weight_types.empty();
    }
    if (context->HasAttr("from_residual")) {
      OP_REQUIRES_OK(context, context->GetAttr("from_residual", &kind_.from_residual));
    }
  }

  void Compile(XlaOpKernelContext* context) override {
    xla::XlaBuilder* const builder = context->builder();
    XlaOp centers;
    TensorShape table;
    xla::PrimitiveType type;
    OP_REQUIRES_OK(context, context->ReadVariableInput(0, type_, &table, &centers));
    OP_REQUIRES_OK(context, DataTypeToPrimitiveType(type_, &type));

    const auto number = [&](float constant) {
      return xla::ConvertElementType(xla::ConstantR0<float>(builder, constant), type);
    };
    std::vector<XlaOp> operands = {centers, context->Input(1), context->Input(2)};
    int next = 3;
    operands.push_back(alpha_types_.empty() ? number(constant_alpha_) : context->Input(next++));
    operands.push_back(loss_weight_types_.empty() ? number(constant_loss_weight_)
                                                  : context->Input(next++));
    if (kind_.weighted) operands.push_back(context->Input(next++));
    for (; next < context->num_inputs(); ++next) {
      const auto shape = context->InputXlaShape(next);
      OP_REQUIRES_OK(context, shape.status());
      // A value as large as the table may be the table itself, and the call cannot take a value of
      // dynamic size.
      if (shape->is_static() && ShapeUtil::ElementsIn(*shape) < table.num_elements()) {
        operands.push_back(context->Input(next));
      }
    }
    // The kernels need row-major arrays. Without these layouts XLA for a GPU may choose others.
    std::vector<xla::Shape> shapes;
    for (const XlaOp operand : operands) {
      const auto shape = builder->GetShape(operand);
      OP_REQUIRES_OK(context, shape.status());
      shapes.push_back(xla::LayoutUtil::GetWithDefaultLayout(*shape));
    }
    OP_REQUIRES_OK(context, CheckShapes(shapes));
    const int64_t batch = shapes[1].dimensions(0), dim = shapes[1].dimensions(1);

    std::vector<xla::Shape> results = ResultShapes(shapes[0], batch);
    const bool on_cpu =
        context->compiler()->options().device_type.type_string() == tensorflow::DEVICE_CPU_XLA_JIT;
    if (!on_cpu) {
      const int64_t bytes = XlaWorkspaceBytes(batch, dim, DataTypeSize(type_));
      OP_REQUIRES(context, bytes >= 0,
                  absl::UnimplementedError("centers: expected a table on a CPU, got one on a GPU, "
                                           "for which this library was built without kernels"));
      results.push_back(ShapeUtil::MakeShape(xla::U8, {bytes}));
    }
    using Alias = std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>;
    const std::vector<Alias> in_place(kind_.moves ? 1 : 0, Alias({0}, {0, {}}));
    const XlaOp call = xla::CustomCallWithLayout(
        builder, on_cpu ? kCpuTarget : kGpuTarget, operands, ShapeUtil::MakeTupleShape(results),
        shapes, Attributes(kind_), /*has_side_effect=*/false, in_place,
        /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);

    int64_t result = 0;
    if (kind_.moves) {
      AddReadDependencies(*builder, table.num_elements());
      OP_REQUIRES_OK(context,
                     context->AssignVariable(0, type_, xla::GetTupleElement(call, result++)));
    }
    if (kind_.has_loss) {
      context->SetOutput(0, xla::GetTupleElement(call, result++));
      // The backward pass bitcasts back, and XLA eliminates both.
      context->SetOutput(1, xla::BitcastConvertType(xla::GetTupleElement(call, result++),
                                                    type == xla::F64 ? xla::S64 : xla::U32));
      context->SetOutput(2, xla::GetTupleElement(call, result));
    }
  }

 private:
  // Checks the shapes of the operands, which may be unknown at trace time.
  absl::Status CheckShapes(const std::vector<xla::Shape>& shapes) const {
    const auto table = shapes[0].dimensions(), features = shapes[1].dimensions();
    if (features.size() != 2) return Mismatch("features", features, "[B, D]");
    const int64_t batch = features[0], dim = features[1];
    const auto is_vector = [batch](absl::Span<const int64_t> shape) {
      return shape.size() == 1 && shape[0] == batch;
    };
    const auto labels = shapes[2].dimensions();
    if (!is_vector(labels)) return Mismatch("labels", labels, absl::StrCat("[", batch, "]"));
    if (kind_.weighted && !is_vector(shapes[5].dimensions())) {
      return Mismatch("sample_weight", shapes[5].dimensions(), absl::StrCat("[", batch, "]"));
    }
    if (table.size() != 2 || table[1] != dim || table[0] < 1) {
      return Mismatch("centers", table, absl::StrCat("[C, ", dim, "]"));
    }
    return absl::OkStatus();
  }

  // The results of the call, without a GPU's workspace.
  std::vector<xla::Shape> ResultShapes(const xla::Shape& table, int64_t batch) const {
    const auto type = table.element_type();
    const int64_t dim = table.dimensions(1);
    std::vector<xla::Shape> shapes;
    if (kind_.moves) shapes.push_back(table);
    if (kind_.has_loss) {
      const bool per_sample = kind_.reduction == Reduction::kNone;
      shapes.push_back(per_sample ? ShapeUtil::MakeShape(type, {batch})
                                  : ShapeUtil::MakeShape(type, {}));
      shapes.push_back(ShapeUtil::MakeShape(type, {batch, dim}));
      shapes.push_back(ShapeUtil::MakeShape(type, {batch}));
    }
    return shapes;
  }

  static absl::Status Mismatch(const char* name, absl::Span<const int64_t> got,
                               const std::string& expected) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": expected shape ", expected, ", got [", absl::StrJoin(got, ","), "]"));
  }

  DataType type_;
  StepKind kind_;
  tensorflow::DataTypeVector alpha_types_, loss_weight_types_;  // of length 0 or 1
  float constant_alpha_ = 0, constant_loss_weight_ = 1;
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
      // upstream is [] or [B].
      const std::vector<int64_t> along(static_cast<size_t>(shapes[0].dims()), 0);
      gradient = xla::BroadcastInDim(upstream[0], residual->dimensions(), along) * gradient;
    }
    context->SetOutput(0, xla::ConvertElementType(gradient, feature_type));
  }

 private:
  DataType feature_type_, center_type_;
};

// Each lowering is registered twice. TensorFlow reads the registrations of REGISTER_XLA_OP once,
// when the process first uses XLA, which may be before this library is loaded; the kernels are
// registered directly for that case.
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
