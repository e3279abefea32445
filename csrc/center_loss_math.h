// The scalar equations of the step, shared by the CPU kernel and the CUDA kernel so that both
// compute the same thing.

#ifndef TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_MATH_H_
#define TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_MATH_H_

#include <cstdint>

#include "csrc/center_loss.h"

namespace tcl {

// s_j: the factor by which a center moves along the sum of its residuals. `count` is n_j, at least
// 1, and `counted` is N.
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

// The factor of w_i * d_i in the gradient d(loss)/d(x_i). With N = 0 the mean is defined as 0.
template <typename Center>
TCL_INLINE Center ReductionScale(Reduction reduction, Center loss_weight, int64_t counted) {
  if (reduction != Reduction::kMean) return loss_weight;
  return counted == 0 ? Center{0} : loss_weight / static_cast<Center>(counted);
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_MATH_H_
