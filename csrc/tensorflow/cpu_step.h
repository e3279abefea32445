// The step on the CPU with its errors as absl::Status, for the op kernels and the XLA call.

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_CPU_STEP_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_CPU_STEP_H_

#include <cmath>
#include <cstdint>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "csrc/center_loss_cpu.h"
#include "csrc/isa.h"

namespace tcl {

// Runs one step. If it returns an error, nothing is written.
template <typename Feature, typename Label>
absl::Status StepOnCpu(const StepArguments<Feature, Label>& step, const ParallelFor& threads) {
  const auto alpha = step.options.alpha;
  if (step.options.update_centers && !(std::isfinite(alpha) && alpha >= 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("alpha: expected a finite number >= 0, got ", alpha));
  }
  const int64_t invalid = CenterLossOnCpu(step, threads, BestIsa());
  if (invalid == kStepDone) return absl::OkStatus();
  if (invalid == kStepOutOfMemory) {
    return absl::ResourceExhaustedError(
        absl::StrCat("out of memory: could not allocate the scratch arrays of a step of ",
                     step.batch, " samples of ", step.dim, " features"));
  }
  // Python gives this label to a one-hot row that names no class (NO_CLASS_IN_ROW).
  const bool no_class =
      static_cast<int64_t>(step.labels[invalid]) == std::numeric_limits<int64_t>::min();
  return absl::InvalidArgumentError(absl::StrCat(
      "labels[", invalid, "] = ", step.labels[invalid], " is outside [0, ", step.classes, ")",
      no_class ? ": the label of a one-hot row that is all zero or not finite" : ""));
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_CPU_STEP_H_
