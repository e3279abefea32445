// The step as an XLA custom call: the interface between the lowering (xla_kernels.cc), which emits
// the call, and its handlers (xla_cpu_call.cc, xla_gpu_call.cc), which run it. This file knows
// XLA's FFI and StepArguments; it does not know TensorFlow.
//
// Operands: centers [C, D], features [B, D], labels [B], alpha [], loss_weight [], then
// sample_weight [B] if `weighted`, then any number of values that must be computed before the step.
// Results: the centers if `moves`, in the buffer of their operand; loss, scaled residual [B, D] and
// squared_distance [B] if `has_loss`; on a GPU the workspace of the kernel, in bytes, as the last.

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_CALL_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_CALL_H_

#include <cstddef>
#include <cstdint>

#include "csrc/center_loss.h"
#include "xla/ffi/api/ffi.h"

namespace tcl {

constexpr char kCpuTarget[] = "tf_center_loss_op.cpu";
constexpr char kGpuTarget[] = "tf_center_loss_op.cuda";

// The attributes of a call.
struct StepKind {
  Rule rule = Rule::kPaper;
  Reduction reduction = Reduction::kMean;
  bool has_ignore_class = false;
  int64_t ignore_class = 0;
  bool moves = false;          // updates the centers
  bool has_loss = false;       // computes loss, scaled residual and squared_distance
  bool from_residual = false;  // StepArguments::features_are_residuals
  bool weighted = false;       // has a sample_weight
};

// The size of the workspace in bytes, -1 in a library without CUDA kernels. The op library exports
// this function to the library of the lowerings.
__attribute__((visibility("default"))) int64_t XlaWorkspaceBytes(int64_t batch, int64_t dim,
                                                                 int64_t center_size);

}  // namespace tcl

XLA_FFI_REGISTER_ENUM_ATTR_DECODING(tcl::Rule);
XLA_FFI_REGISTER_ENUM_ATTR_DECODING(tcl::Reduction);
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(tcl::StepKind, StructMember<tcl::Rule>("rule"),
                                      StructMember<tcl::Reduction>("reduction"),
                                      StructMember<bool>("has_ignore_class"),
                                      StructMember<int64_t>("ignore_class"),
                                      StructMember<bool>("moves"), StructMember<bool>("has_loss"),
                                      StructMember<bool>("from_residual"),
                                      StructMember<bool>("weighted"));

namespace xla::ffi {
// Declared here, because the header that declares it includes headers that TensorFlow's wheel
// lacks.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace tcl {

namespace ffi = xla::ffi;

// The signature of a handler: all arguments, all results and a StepKind.
inline auto BindStep() {
  return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs<StepKind>();
}

// Calls run(step, alpha, loss_weight) with the buffers of a call as StepArguments.
template <typename Feature, typename Label, typename Run>
ffi::Error RunStep(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                   const StepKind& kind, const Run& run) {
  using Center = CenterType<Feature>;
  const auto operand = [&](size_t k) { return args.get<ffi::AnyBuffer>(k)->untyped_data(); };
  size_t results = 0;
  const auto next_result = [&] {
    return static_cast<Center*>((*rets.get<ffi::AnyBuffer>(results++))->untyped_data());
  };
  const auto sizes = args.get<ffi::AnyBuffer>(1)->dimensions();

  StepArguments<Feature, Label> step;
  step.batch = sizes[0];
  step.dim = sizes[1];
  step.classes = args.get<ffi::AnyBuffer>(0)->dimensions()[0];
  step.centers = static_cast<Center*>(operand(0));
  step.features = static_cast<const Feature*>(operand(1));
  step.labels = static_cast<const Label*>(operand(2));
  if (kind.weighted) step.sample_weight = static_cast<const Center*>(operand(5));
  if (kind.moves) next_result();  // the same buffer as step.centers
  if (kind.has_loss) {
    step.loss = next_result();
    step.residual = next_result();
    step.squared_distance = next_result();
  }
  step.features_are_residuals = kind.from_residual;
  step.options.rule = kind.rule;
  step.options.reduction = kind.reduction;
  step.options.has_ignore_class = kind.has_ignore_class;
  step.options.ignore_class = kind.ignore_class;
  step.options.update_centers = kind.moves;
  return run(step, static_cast<const Center*>(operand(3)), static_cast<const Center*>(operand(4)));
}

// Calls run(step, alpha, loss_weight) with the types of the call's buffers. alpha and loss_weight
// are pointers, because on a GPU the host cannot read them.
template <typename Run>
ffi::Error WithStep(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                    const StepKind& kind, const Run& run) {
  const auto run_with = [&](auto feature) {
    using Feature = decltype(feature);
    return args.get<ffi::AnyBuffer>(2)->element_type() == ffi::S32
               ? RunStep<Feature, int32_t>(args, rets, kind, run)
               : RunStep<Feature, int64_t>(args, rets, kind, run);
  };
  switch (args.get<ffi::AnyBuffer>(1)->element_type()) {
    case ffi::F64:
      return run_with(double{});
    case ffi::F16:
      return run_with(Half{});
    case ffi::BF16:
      return run_with(BFloat16{});
    default:
      return run_with(float{});
  }
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_CALL_H_
