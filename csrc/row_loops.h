// The hot loops over rows of D numbers, compiled once per instruction set and chosen at run
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

// So many samples of one class are gone through together at most. With more, more rows are in
// flight than first-level cache and prefetchers keep up with (64 x 200 and 4096 x 512 numbers).
constexpr int kMaxRows = 2;

// `rows` samples of one class. Its center and the sum are read and written once for all.
template <typename Feature>
struct RowArguments {
  using Center = CenterType<Feature>;

  int rows = 1;
  const Feature* features[kMaxRows];
  Center factor[kMaxRows];
  Center* residual[kMaxRows];       // residual[0] null: unwanted
  const Center* centers = nullptr;  // null: the features are the residual
  Center* sum = nullptr;
  // What comes after, to be fetched meanwhile; null: nothing.
  const RowArguments* next = nullptr;
};

template <typename Feature>
struct RowLoops {
  using Center = CenterType<Feature>;

  // With d = features - centers, of each row: squares = the sum of d^2, residual = factor * d; and
  // starts or continues sum += d, row by row.
  void (*residual)(const RowArguments<Feature>& rows, Sum mode, int64_t dim, Center* squares);

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
