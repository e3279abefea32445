// The CPU kernel as an XLA custom call: buffers to pointers, XLA's threads to a parallel-for.
//
// Why not HLO on the CPU: as HLO (xla_hlo.cc) the same step reads and writes the batch some ten
// times, most of it on one thread, and takes 5 to 16 times as long (64 to 16,384 samples, 10 to 1M
// labels, 2 cores: the rows "as HLO" of `python -m bench`). Either form moves the centers in place.
//
// XLA knows no order but that of data, and hands the step a copy of the table where the program
// reads it in no order with the step. So the call takes, unused, what was computed from earlier
// reads (`after`, which reads_in_xla in _native.py finds), and what AfterEarlierReads finds.
//
// A kernel cannot raise under XLA, so a label out of range makes its own sample NaN: it is handed
// on as a sample of class 0 with features of NaN, which the kernel lets count in N and move
// nothing.
//
// Deterministic, and the same bits as without XLA: it is the same kernel.

#include "csrc/tensorflow/xla_cpu_call.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "csrc/center_loss_cpu.h"
#include "csrc/pool_threads.h"
#include "xla/ffi/api/ffi.h"
#include "xla/service/hlo.pb.h"
#include "xla/shape_util.h"

namespace xla::ffi {
// Declared here because the header that declares it needs headers that the wheel does not bring.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace tcl {
namespace {

namespace ffi = xla::ffi;

using xla::XlaOp;

constexpr char kTarget[] = "tf_center_loss_op.cpu";

// The instructions of a program that is being built, for which XlaBuilder has no accessor; an
// explicit instantiation may name a private member.
std::deque<xla::HloInstructionProto>& InstructionsOf(xla::XlaBuilder& builder);
template <std::deque<xla::HloInstructionProto> xla::XlaBuilder::* kMember>
struct PrivateMember {
  friend std::deque<xla::HloInstructionProto>& InstructionsOf(xla::XlaBuilder& builder) {
    return builder.*kMember;
  }
};
template struct PrivateMember<&xla::XlaBuilder::instructions_>;

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

// Makes the last instruction, which overwrites its first operand, an instruction that comes after
// everything so far that reads that operand: for a step in a `tf.function` that is called from
// another, which TensorFlow traced apart from the reads there. (A control dependency would do, but
// keeps passes from rewriting a gather that the code generator then cannot take.) Values as large
// as the table are passed through: what the step waits for is what came of them, the sum over the
// table or the loop's result; so are those whose size XLA does not know, which no call can take.
void AfterEarlierReads(xla::XlaBuilder& builder, int64_t elements) {
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
    }
  }
}

// A batch in which the bad labels are samples of class 0 with features of NaN.
template <typename Feature, typename Label>
struct Repaired {
  Repaired(StepArguments<Feature, Label>* step)
      : features(step->features, step->features + step->batch * step->dim),
        labels(step->labels, step->labels + step->batch) {
    const auto& options = step->options;
    for (int64_t i = 0; i < step->batch; ++i) {
      const int64_t label = static_cast<int64_t>(step->labels[i]);
      if (options.has_ignore_label && label == options.ignore_label) continue;
      if (label >= 0 && label < step->classes) continue;
      labels[static_cast<size_t>(i)] = 0;
      std::fill_n(features.begin() + i * step->dim, step->dim,
                  Round<Feature>(std::numeric_limits<CenterType<Feature>>::quiet_NaN()));
    }
    step->features = features.data();
    step->labels = labels.data();
  }

  std::vector<Feature> features;
  std::vector<Label> labels;
};

template <typename Feature, typename Label>
ffi::Error RunStep(const StepKind& kind, bool weighted, ffi::ThreadPool& pool,
                   const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  using Center = CenterType<Feature>;
  const auto operand = [&](size_t k) { return args.get<ffi::AnyBuffer>(k)->untyped_data(); };
  const auto result = [&](size_t k) {
    return static_cast<Center*>((*rets.get<ffi::AnyBuffer>(k))->untyped_data());
  };
  const auto sizes = args.get<ffi::AnyBuffer>(1)->dimensions();
  const size_t first_loss = kind.moves ? 1 : 0;

  StepArguments<Feature, Label> step;
  step.batch = sizes[0];
  step.dim = sizes[1];
  step.classes = args.get<ffi::AnyBuffer>(0)->dimensions()[0];
  step.features = static_cast<const Feature*>(operand(1));
  step.labels = static_cast<const Label*>(operand(2));
  step.centers = static_cast<Center*>(operand(0));
  if (weighted) step.sample_weight = static_cast<const Center*>(operand(5));
  if (kind.has_loss) {
    step.loss = result(first_loss);
    step.residual = result(first_loss + 1);
    step.squared_distance = result(first_loss + 2);
  }
  step.features_are_residuals = kind.from_residual;
  step.options.rule = kind.rule;
  step.options.reduction = kind.reduction;
  step.options.has_ignore_label = kind.has_ignore_label;
  step.options.ignore_label = kind.ignore_label;
  step.options.weight = *static_cast<const Center*>(operand(3));
  step.options.alpha = *static_cast<const Center*>(operand(4));
  step.options.update_centers = kind.moves;
  if (!(std::isfinite(step.options.alpha) && step.options.alpha >= 0)) {
    return ffi::Error::InvalidArgument(
        absl::StrCat("alpha: expected a finite number >= 0, got ", step.options.alpha));
  }

  const auto schedule = [&pool](std::function<void()> task, bool again) {
    if (!again) pool.Schedule(std::move(task));
  };
  const ParallelFor threads = OnThreads(schedule, pool.num_threads());
  if (CenterLossOnCpu(step, threads, BestIsa()) >= 0) {
    const Repaired<Feature, Label> repaired(&step);
    CenterLossOnCpu(step, threads, BestIsa());
  }
  return ffi::Error::Success();
}

ffi::Error Run(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t rule,
               int64_t reduction, bool has_ignore_label, int64_t ignore_label, bool moves,
               bool has_loss, bool from_residual, bool weighted) {
  StepKind kind;
  kind.rule = static_cast<Rule>(rule);
  kind.reduction = static_cast<Reduction>(reduction);
  kind.has_ignore_label = has_ignore_label;
  kind.ignore_label = ignore_label;
  kind.moves = moves;
  kind.has_loss = has_loss;
  kind.from_residual = from_residual;

  const auto run = [&](auto feature) {
    using Feature = decltype(feature);
    return args.get<ffi::AnyBuffer>(2)->element_type() == ffi::S32
               ? RunStep<Feature, int32_t>(kind, weighted, pool, args, rets)
               : RunStep<Feature, int64_t>(kind, weighted, pool, args, rets);
  };
  switch (args.get<ffi::AnyBuffer>(1)->element_type()) {
    case ffi::F64:
      return run(double{});
    case ffi::F16:
      return run(Half{});
    case ffi::BF16:
      return run(BFloat16{});
    default:
      return run(float{});
  }
}

XLA_FFI_DEFINE_HANDLER(kHandler, Run,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<int64_t>("rule")
                           .Attr<int64_t>("reduction")
                           .Attr<bool>("has_ignore_label")
                           .Attr<int64_t>("ignore_label")
                           .Attr<bool>("moves")
                           .Attr<bool>("has_loss")
                           .Attr<bool>("from_residual")
                           .Attr<bool>("weighted"));

XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kTarget, "Host", kHandler);

// The attributes, as a custom call carries them.
std::string Attributes(const StepKind& kind, bool weighted) {
  const auto boolean = [](bool value) { return value ? "true" : "false"; };
  return absl::StrCat(
      "{rule = ", static_cast<int>(kind.rule),
      " : i64, reduction = ", static_cast<int>(kind.reduction),
      " : i64, has_ignore_label = ", boolean(kind.has_ignore_label),
      ", ignore_label = ", kind.ignore_label, " : i64, moves = ", boolean(kind.moves),
      ", has_loss = ", boolean(kind.has_loss), ", from_residual = ", boolean(kind.from_residual),
      ", weighted = ", boolean(weighted), "}");
}

}  // namespace

StepResults StepOnCpu(const StepKind& kind, const StepOperands& in) {
  std::vector<XlaOp> operands = {in.centers, in.features, in.labels, in.weight, in.alpha};
  if (in.sample_weight) operands.push_back(*in.sample_weight);
  operands.insert(operands.end(), in.after.begin(), in.after.end());

  std::vector<xla::Shape> shapes;
  using Alias = std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>;
  const std::vector<Alias> in_place(kind.moves ? 1 : 0, Alias({0}, {0, {}}));
  if (kind.moves) {
    shapes.push_back(xla::ShapeUtil::MakeShape(in.center_type, {in.classes, in.dim}));
  }
  if (kind.has_loss) {
    shapes.push_back(kind.reduction == Reduction::kNone
                         ? xla::ShapeUtil::MakeShape(in.center_type, {in.batch})
                         : xla::ShapeUtil::MakeShape(in.center_type, {}));
    shapes.push_back(xla::ShapeUtil::MakeShape(in.center_type, {in.batch, in.dim}));
    shapes.push_back(xla::ShapeUtil::MakeShape(in.center_type, {in.batch}));
  }
  xla::XlaBuilder* const builder = in.features.builder();
  const XlaOp call = xla::CustomCall(
      builder, kTarget, operands, xla::ShapeUtil::MakeTupleShape(shapes),
      Attributes(kind, in.sample_weight.has_value()), /*has_side_effect=*/false, in_place,
      /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
      xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  if (kind.moves) AfterEarlierReads(*builder, in.classes * in.dim);

  StepResults out;
  int64_t next = 0;
  if (kind.moves) out.centers = xla::GetTupleElement(call, next++);
  if (kind.has_loss) {
    out.loss = xla::GetTupleElement(call, next++);
    // As numbers here and as numbers in the backward pass: the two conversions cancel out.
    out.residual_bits =
        xla::BitcastConvertType(xla::GetTupleElement(call, next++), BitsOf(in.center_type));
    out.squared_distance = xla::GetTupleElement(call, next);
  }
  return out;
}

}  // namespace tcl
