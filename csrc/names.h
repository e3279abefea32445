// The names of rules and reductions, which the op attributes, XLA and the Python module _kernels
// have in common, and the error text for an unknown name.

#ifndef TF_CENTER_LOSS_OP_CSRC_NAMES_H_
#define TF_CENTER_LOSS_OP_CSRC_NAMES_H_

#include <cstddef>
#include <string>

#include "csrc/center_loss.h"

namespace tcl {

template <typename Enum>
struct NamedValue {
  const char* name;
  Enum value;
};

inline constexpr NamedValue<Rule> kRules[] = {{"paper", Rule::kPaper},
                                              {"mean", Rule::kMean},
                                              {"sum", Rule::kSum},
                                              {"batch_mean", Rule::kBatchMean},
                                              {"paper_batch_mean", Rule::kPaperBatchMean},
                                              {"tutorial", Rule::kTutorial}};
inline constexpr NamedValue<Reduction> kReductions[] = {
    {"sum", Reduction::kSum}, {"mean", Reduction::kMean}, {"none", Reduction::kNone}};

template <typename Enum, std::size_t kSize>
bool ParseName(const NamedValue<Enum> (&known)[kSize], const std::string& name, Enum* value) {
  for (const NamedValue<Enum>& one : known) {
    if (name != one.name) continue;
    *value = one.value;
    return true;
  }
  return false;
}

// "rule: unknown rule 'x', expected one of 'paper', 'mean', ..." for the argument "rule".
template <typename Enum, std::size_t kSize>
std::string UnknownName(const NamedValue<Enum> (&known)[kSize], const std::string& argument,
                        const std::string& name) {
  std::string text = argument + ": unknown " + argument + " '" + name + "', expected one of ";
  const char* separator = "'";
  for (const NamedValue<Enum>& one : known) {
    text += separator + std::string(one.name) + "'";
    separator = ", '";
  }
  return text;
}

inline bool ParseRule(const std::string& name, Rule* rule) { return ParseName(kRules, name, rule); }
inline std::string UnknownRule(const std::string& name) {
  return UnknownName(kRules, "rule", name);
}

inline bool ParseReduction(const std::string& name, Reduction* reduction) {
  return ParseName(kReductions, name, reduction);
}
inline std::string UnknownReduction(const std::string& name) {
  return UnknownName(kReductions, "reduction", name);
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_NAMES_H_
