// Parses the names of rules and reductions. The op attributes, XLA and the Python modules all
// accept these names; each function returns false for any other name.

#ifndef TF_CENTER_LOSS_OP_CSRC_NAMES_H_
#define TF_CENTER_LOSS_OP_CSRC_NAMES_H_

#include <string>

#include "csrc/center_loss.h"

namespace tcl {

inline bool ParseRule(const std::string& name, Rule* rule) {
  static constexpr struct {
    const char* name;
    Rule rule;
  } kRules[] = {{"paper", Rule::kPaper},
                {"mean", Rule::kMean},
                {"sum", Rule::kSum},
                {"batch_mean", Rule::kBatchMean},
                {"paper_batch_mean", Rule::kPaperBatchMean},
                {"tutorial", Rule::kTutorial}};
  for (const auto& known : kRules) {
    if (name != known.name) continue;
    *rule = known.rule;
    return true;
  }
  return false;
}

inline bool ParseReduction(const std::string& name, Reduction* reduction) {
  static constexpr struct {
    const char* name;
    Reduction reduction;
  } kReductions[] = {
      {"sum", Reduction::kSum}, {"mean", Reduction::kMean}, {"none", Reduction::kNone}};
  for (const auto& known : kReductions) {
    if (name != known.name) continue;
    *reduction = known.reduction;
    return true;
  }
  return false;
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_NAMES_H_
