// The hot loops over one row of D numbers, compiled once per instruction set and chosen at run
// time.
//
// Every instruction set gives the same bits: sums run in kLanes fixed lanes that are folded in a
// fixed order, and products are never contracted into fused multiply-adds (-ffp-contract=off). The
// loops are bound by memory, so this costs nothing.

#ifndef TF_CENTER_LOSS_OP_CSRC_ROW_LOOPS_H_
#define TF_CENTER_LOSS_OP_CSRC_ROW_LOOPS_H_

#include <cstdint>

#include "csrc/numeric_types.h"

namespace tcl {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// What is done with the sum of a group's residuals while a row goes by.
enum class Sum { kNone, kStart, kAdd };

template <typename Feature>
struct RowLoops {
  using Center = CenterType<Feature>;

  // d = features - centers (d = features where centers is null). Returns the sum of d^2; writes
  // residual = factor * d unless residual is null; starts or continues sum += d. The rows that the
  // next call reads are fetched meanwhile.
  Center (*residual)(const Feature* features, const Center* centers, Center factor,
                     Center* residual, Sum mode, Center* sum, const Feature* next_features,
                     const Center* next_centers, int64_t dim);

  // centers += scale * sum.
  void (*move)(Center* centers, Center scale, const Center* sum, int64_t dim);

  // sum += other.
  void (*add)(Center* sum, const Center* other, int64_t dim);

  // out = factor * residual, rounded to the features' type.
  void (*scale)(const Center* residual, Center factor, Feature* out, int64_t dim);

  bool (*all_finite)(const Feature* features, int64_t dim);
};

// The loops for `isa`, which must be Supported().
template <typename Feature>
const RowLoops<Feature>& GetRowLoops(Isa isa);

bool Supported(Isa isa);
Isa BestIsa();

// One definition in each object that row_loops.cc is compiled to.
namespace baseline {
template <typename Feature>
const RowLoops<Feature>& Loops();
}
namespace avx2 {
template <typename Feature>
const RowLoops<Feature>& Loops();
}
namespace avx512 {
template <typename Feature>
const RowLoops<Feature>& Loops();
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_ROW_LOOPS_H_
