// The center loss step as HLO.

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_HLO_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_HLO_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "csrc/center_loss.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/xla_data.pb.h"

namespace tcl {

// What a step computes, apart from its arrays; alpha and weight are arrays here.
struct StepKind {
  Rule rule = Rule::kPaper;
  Reduction reduction = Reduction::kMean;
  bool has_ignore_label = false;
  int64_t ignore_label = 0;
  bool moves = false;     // the centers
  bool has_loss = false;  // and residual
  bool from_residual = false;
};

// The arrays of a step as values of a program.
struct StepOperands {
  xla::XlaOp centers;                       // [C, D]
  xla::XlaOp features;                      // [B, D]
  xla::XlaOp labels;                        // [B]
  xla::XlaOp weight;                        // []
  xla::XlaOp alpha;                         // []
  std::optional<xla::XlaOp> sample_weight;  // [B]
  std::vector<xla::XlaOp> after;            // what the step waits for
  int64_t batch = 0, dim = 0, classes = 0;
  xla::PrimitiveType center_type = xla::F32;
};

struct StepResults {
  xla::XlaOp centers;           // where the kind moves them
  xla::XlaOp loss;              // where the kind has a loss
  xla::XlaOp residual_bits;     // likewise
  xla::XlaOp squared_distance;  // likewise
};

inline xla::PrimitiveType BitsOf(xla::PrimitiveType center_type) {
  return center_type == xla::F64 ? xla::S64 : xla::U32;
}

absl::StatusOr<StepResults> StepInHlo(const StepKind& kind, const StepOperands& in);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_HLO_H_
