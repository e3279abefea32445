// The arguments of one center loss step, for the CPU kernel and the CUDA kernel. This file contains
// plain types only and includes no framework.
//
// Source of the mathematics: Wen, Zhang, Li, Qiao, "A Discriminative Feature Learning Approach for
// Deep Face Recognition", ECCV 2016, equations 2 to 4.
//
//   d_i      = x_i - c_{y_i}, always with the centers as they were before the step
//   loss_i   = w_i * 1/2 ||d_i||^2
//   c_j     += sum over {i : y_i = j} of s_j * d_i, s_j by the rule (center_loss_math.h)
//
// A sample is counted if its label is not ignore_class; N is the number of counted samples. n_j is
// the number of counted samples of class j whose features are all finite. A sample with a NaN or an
// infinity among its features never moves a center.

#ifndef TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_H_
#define TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_H_

#include <cstdint>

#include "csrc/numeric_types.h"

namespace tcl {

enum class Rule { kPaper, kMean, kSum, kBatchMean, kPaperBatchMean, kTutorial };
enum class Reduction { kSum, kMean, kNone };

// The options and scalars of a step. `loss_weight` is the lambda of the paper's equation 5: it
// multiplies the loss and its gradient here, which saves a second pass over the residual.
template <typename Center>
struct StepOptions {
  Rule rule = Rule::kPaper;
  Reduction reduction = Reduction::kMean;
  bool has_ignore_class = false;
  int64_t ignore_class = 0;
  Center alpha = 0;
  Center loss_weight = 1;
  bool update_centers = true;
};

// The arrays of a step are dense and row-major. An array that is written must not overlap another.
//
// The arithmetic is done in the centers' type, which is also the type of `residual`: the scaled
// residual, which is d_i times its factors in the gradient of the loss. For 16-bit features the
// backward pass rounds it, after it has multiplied it by the upstream gradient; rounding before
// that would lose small gradients under a loss scale.
//
// If `features_are_residuals`, `features` holds d_i from an earlier forward pass, and the centers
// are updated without being read for the residual.
template <typename Feature, typename Label>
struct StepArguments {
  using Center = CenterType<Feature>;

  int64_t batch = 0;                      // B
  int64_t dim = 0;                        // D
  int64_t classes = 0;                    // C
  const Feature* features = nullptr;      // [B, D]
  const Label* labels = nullptr;          // [B]
  const Center* sample_weight = nullptr;  // [B], or null: all one
  Center* centers = nullptr;              // [C, D], written only if options.update_centers
  Center* loss = nullptr;                 // [], or [B] for Reduction::kNone; null: not wanted
  Center* residual = nullptr;             // [B, D] scaled: d(loss)/d(features); null: not wanted
  Center* squared_distance = nullptr;     // [B] ||d_i||^2, 0 if ignored; null: not wanted
  bool features_are_residuals = false;
  StepOptions<Center> options;
};

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_H_
