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

// What is done with the sum of a class's residuals while its rows go by.
enum class Sum { kNone, kStart, kAdd };

// Samples of one class, by their positions in the batch.
template <typename Feature>
struct RowArguments {
  using Center = CenterType<Feature>;

  int64_t rows = 1;
  const int64_t* positions = nullptr;     // [rows]
  const Feature* features = nullptr;      // [B, D]
  const Center* sample_weight = nullptr;  // [B], or null: all one
  Center scale = 1;                       // of the residual, beside the sample's weight
  Center* residual = nullptr;             // [B, D]; null: unwanted
  const Center* centers = nullptr;        // [D], the class's; null: the features are the residual
  Center* sum = nullptr;                  // [D]
  // Samples of a class that comes later, to be fetched while the last of these are gone through.
  int later_rows = 0;                        // 1 to kRowsTogether
  const int64_t* later_positions = nullptr;  // [later_rows]
  const Center* later_centers = nullptr;     // [D]
};

// So many samples are gone through together. With more, more rows are in flight than first-level
// cache and prefetchers keep up with (64 x 200 and 4096 x 512 numbers).
constexpr int kRowsTogether = 2;

template <typename Feature>
struct RowLoops {
  using Center = CenterType<Feature>;

  // With d = features - centers, of each row r: squares[r] = the sum of d^2, residual = scale * d;
  // and starts or continues sum += d, row by row.
  void (*residual)(const RowArguments<Feature>& rows, Sum mode, int64_t dim, Center* squares);

  // Fetches what is later.
  void (*fetch)(const RowArguments<Feature>& rows, int64_t dim);

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
