// The inner loops of the CPU kernels. A row is the D numbers of one sample or of one center.
//
// row_loops.cc is compiled once per instruction set; isa.h returns the table of functions for one
// of them. All of them give the same bits: a sum has kLanes interleaved partial sums, which are
// added in a fixed tree, and products are not contracted into fused multiply-adds
// (-ffp-contract=off). The loops are bound by memory, so this costs no time. They know neither
// labels nor threads.

#ifndef TF_CENTER_LOSS_OP_CSRC_ROW_LOOPS_H_
#define TF_CENTER_LOSS_OP_CSRC_ROW_LOOPS_H_

#include <cstdint>

#include "csrc/numeric_types.h"

namespace tcl {

// Whether the residual loop computes the sum of the residuals, and whether the sum starts with
// these rows or continues.
enum class SumMode { kNone, kStart, kContinue };

// Several samples of one class, given by their positions in the batch.
template <typename Feature>
struct RowArguments {
  using Center = CenterType<Feature>;

  int64_t rows = 1;
  const int64_t* positions = nullptr;     // [rows]
  const Feature* features = nullptr;      // [B, D]
  const Center* sample_weight = nullptr;  // [B], or null: all one
  Center scale = 1;                       // multiplies the residual, as does the sample's weight
  Center* residual = nullptr;             // [B, D] scaled residual; null: not wanted
  const Center* centers = nullptr;        // [D], the class's; null: the features are the residual
  Center* sum = nullptr;                  // [D]
  // Samples of a later class, which are prefetched during the last of these rows.
  int prefetch_rows = 0;                        // 1 to kRowsPerPass
  const int64_t* prefetch_positions = nullptr;  // [prefetch_rows]
  const Center* prefetch_centers = nullptr;     // [D]
};

// One pass over D reads this many rows. Measured at 64 x 200 and 4096 x 512: more rows are more
// streams than the first-level cache and the hardware prefetchers handle.
constexpr int kRowsPerPass = 2;

template <typename Feature>
struct RowLoops {
  using Center = CenterType<Feature>;

  // With d = features - centers of each row r: squares[r] = sum of d^2, and the scaled residual
  // residual = weight * scale * d.
  // The mode says whether sum += d starts, continues or is left out; rows are added in order.
  void (*residual)(const RowArguments<Feature>& rows, SumMode mode, int64_t dim, Center* squares);

  // Prefetches the samples of the later class.
  void (*prefetch)(const RowArguments<Feature>& rows, int64_t dim);

  // centers += scale * sum.
  void (*move)(Center* centers, Center scale, const Center* sum, int64_t dim);

  // sum += other.
  void (*add)(Center* sum, const Center* other, int64_t dim);

  // out = factor * residual, rounded to the features' type.
  void (*scale)(const Center* residual, Center factor, Feature* out, int64_t dim);

  bool (*all_finite)(const Feature* features, int64_t dim);
};

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_ROW_LOOPS_H_
