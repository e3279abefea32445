// The framework-free contract of the center loss step: what a kernel is given, what it promises.
//
// Source of the mathematics: Wen, Zhang, Li, Qiao, "A Discriminative Feature Learning Approach for
// Deep Face Recognition", ECCV 2016, equations 2 to 4.
//
//   d_i      = x_i - c_{y_i}, always with the centers as they were before the step
//   loss_i   = w_i * 1/2 ||d_i||^2
//   c_j     += sum over {i : y_i = j} of s_j * d_i, s_j by the rule (center_loss_math.h)
//
// A sample is *counted* when its label is not ignore_class; N is their number. n_j is the number of
// counted samples of class j whose features are all finite; the others never move a center.

#ifndef TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_H_
#define TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_H_

#include <cstdint>

#include "csrc/numeric_types.h"

namespace tcl {

enum class Rule { kPaper, kMean, kSum, kBatchMean, kPaperBatchMean, kTutorial };
enum class Reduction { kSum, kMean, kNone };

// Everything that is not an array. `loss_weight` multiplies the loss and its gradient (the lambda
// of the paper's equation 5), so that a training step needs no second sweep over the residual for
// it.
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

// One step over dense row-major arrays; none that is written may overlap another. Centers are the
// type the arithmetic is done in. The residual is of that type too, also for 16-bit features: it is
// rounded to theirs once, in the backward pass, when the upstream gradient (a loss scale of 2^15,
// say) has been multiplied in.
//
// Where `features_are_residuals`, `features` holds d_i itself and the centers are only written:
// the update alone, from the residual of an earlier forward pass.
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
  Center* loss = nullptr;                 // one number, or [B] for Reduction::kNone; null: unwanted
  Center* residual = nullptr;             // [B, D] d(loss)/d(features); null: unwanted
  Center* squared_distance = nullptr;     // [B] ||d_i||^2, 0 where ignored; null: unwanted
  bool features_are_residuals = false;
  StepOptions<Center> options;
};

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_H_
