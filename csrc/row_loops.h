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
struct RowArguments {
  using Center = CenterType<Feature>;

  const Feature* features = nullptr;
  const Center* centers = nullptr;  // null: the features are the residual
  Center factor = 1;
  Center* residual = nullptr;  // null: unwanted
  Center* sum = nullptr;
  // The rows of the next call, fetched meanwhile; null where they are in the cache anyway.
  const Feature* next_features = nullptr;
  const Center* next_centers = nullptr;
};

template <typename Feature>
struct RowLoops {
  using Center = CenterType<Feature>;

  // With d = features - centers: returns the sum of d^2, writes residual = factor * d, and starts
  // or continues sum += d.
  Center (*residual)(const RowArguments<Feature>& row, Sum mode, int64_t dim);

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
