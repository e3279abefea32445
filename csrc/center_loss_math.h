// The equations, once, for the host and the device.

#ifndef TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_MATH_H_
#define TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_MATH_H_

#include <cstdint>

#include "csrc/center_loss.h"

namespace tcl {

// s_j: how far a class with `count` finite samples moves along the sum of their residuals, in a
// batch of `counted` counted samples. Asked only for classes with count >= 1.
template <typename Center>
TCL_INLINE Center StepScale(Rule rule, Center alpha, int64_t count, int64_t counted) {
  const Center n = static_cast<Center>(count);
  const Center batch = static_cast<Center>(counted);
  switch (rule) {
    case Rule::kPaper:
      return alpha / (1 + n);
    case Rule::kMean:
      return alpha / n;
    case Rule::kSum:
      return alpha;
    case Rule::kBatchMean:
      return alpha / batch;
    case Rule::kPaperBatchMean:
      return alpha / ((1 + n) * batch);
    case Rule::kTutorial:
      return alpha * (1 - alpha) / (1 + n);
  }
  return 0;
}

// d(loss)/d(loss_i) / w_i: what the reduction does to one sample. N = 0 leaves nothing to scale.
template <typename Center>
TCL_INLINE Center ReductionScale(Reduction reduction, Center loss_weight, int64_t counted) {
  if (reduction != Reduction::kMean) return loss_weight;
  return counted == 0 ? Center{0} : loss_weight / static_cast<Center>(counted);
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_MATH_H_
