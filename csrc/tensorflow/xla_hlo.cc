// The center loss step as HLO: one gather of B rows, one scatter of B rows, the rest on [B, D].
//
// Counts and sums of equal labels come from a stable sort: in sorted order the members of a class
// are a run, and a scan by doubling (each row adds the one `shift` before it, if it is of the same
// run, for shift = 1, 2, 4, ...) leaves a run's sum in its last row. The loop ends when no run is
// longer than the shift: no pass for distinct labels, log2 of the largest group at most. Memory is
// O(B D) at any batch size, nothing grows with C. Up to kMatrixBatch samples all labels are
// compared with all instead, and the sums are one product of that matrix with the rows: no sort, no
// loop.
//
// In place also where the program reads the table before the step: XLA knows no order but that of
// data, so whether a sample moves its center depends on what was computed from those reads
// (`after`), in form though not in fact.
//
// Deterministic: every row of the table is scattered to once at most, so no two additions race.
//
// HLO can neither raise nor index out of bounds (it clamps and drops), so what the contract says of
// bad values is written out: a label out of range gives its sample a residual of NaN; an alpha that
// is negative or not finite makes the loss NaN; neither moves a center.

#include "csrc/tensorflow/xla_hlo.h"

#include <limits>
#include <vector>

#include "absl/types/span.h"
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/comparators.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/lib/loops.h"
#include "xla/shape.h"

namespace tcl {
namespace {

using xla::XlaBuilder;
using xla::XlaOp;

XlaOp Int64(XlaBuilder* builder, int64_t value) { return xla::ConstantR0(builder, value); }

// [B] -> [B, D].
XlaOp AlongRows(XlaOp column, const StepOperands& in) {
  return xla::BroadcastInDim(column, {in.batch, in.dim}, {0});
}

XlaOp ZeroUnless(XlaOp condition, XlaOp values) {
  return xla::Select(condition, values, xla::ZerosLike(values));
}

XlaOp SumOf(XlaOp values, xla::PrimitiveType type, absl::Span<const int64_t> dimensions) {
  XlaBuilder* const b = values.builder();
  return xla::Reduce(values, xla::Zero(b, type), xla::CreateScalarAddComputation(type, b),
                     dimensions);
}

XlaOp RowsOf(XlaOp table, XlaOp rows, int64_t dim) {
  xla::GatherDimensionNumbers numbers;
  numbers.add_offset_dims(1);
  numbers.add_collapsed_slice_dims(0);
  numbers.add_start_index_map(0);
  numbers.set_index_vector_dim(1);
  return xla::Gather(table, rows, numbers, {1, dim});
}

XlaOp AddToRows(XlaOp table, XlaOp distinct_rows, XlaOp steps, xla::PrimitiveType type) {
  xla::ScatterDimensionNumbers numbers;
  numbers.add_update_window_dims(1);
  numbers.add_inserted_window_dims(0);
  numbers.add_scatter_dims_to_operand_dims(0);
  numbers.set_index_vector_dim(1);
  return xla::Scatter(table, distinct_rows, steps,
                      xla::CreateScalarAddComputation(type, table.builder()), numbers,
                      /*indices_are_sorted=*/false, /*unique_indices=*/true);
}

// values[i - shift] at i; the first `shift` places hold what nobody asks for.
XlaOp Shifted(XlaOp values, XlaOp shift, int64_t batch) {
  XlaBuilder* const b = values.builder();
  const xla::Shape shape = b->GetShape(values).value();
  std::vector<XlaOp> start(shape.dimensions().size(), Int64(b, 0));
  start[0] = Int64(b, batch) - shift;
  return xla::DynamicSlice(xla::ConcatInDim(b, {values, values}, 0), start, shape.dimensions());
}

// True, which XLA finds out by computing the value only: it keeps no rule by which a number cannot
// both equal and not equal itself.
XlaOp TrueAfter(XlaOp value) {
  XlaBuilder* const b = value.builder();
  const XlaOp number = xla::ConvertElementType(value, xla::F32);
  const XlaOp impossible = xla::And(xla::Eq(number, number), xla::Ne(number, number));
  return xla::ReduceAll(xla::Not(impossible), xla::ConstantR0<bool>(b, true),
                        xla::CreateScalarAndComputation(xla::PRED, b));
}

// s_j for classes of n samples, [B] (center_loss_math.h).
XlaOp StepScales(Rule rule, XlaOp alpha, XlaOp n, XlaOp counted) {
  const XlaOp one = xla::ScalarLike(alpha, 1);
  switch (rule) {
    case Rule::kPaper:
      return alpha / (one + n);
    case Rule::kMean:
      return alpha / n;
    case Rule::kSum:
      return alpha + xla::ZerosLike(n);
    case Rule::kBatchMean:
      return alpha / counted + xla::ZerosLike(n);
    case Rule::kPaperBatchMean:
      return alpha / ((one + n) * counted);
    case Rule::kTutorial:
      return alpha * (one - alpha) / (one + n);
  }
  return n;
}

// Where the matrix was faster than sorting on the CPU (64 x 200); at 128 x 512 it no longer is.
constexpr int64_t kMatrixBatch = 64;

struct Groups {
  XlaOp keys;  // [B] in some order
  XlaOp last;  // [B] whether a place is the last with its key
  XlaOp n;     // [B] at such a place: how many there are
  XlaOp sums;  // [B, D] at such a place: the sum of their rows
};

Groups GroupByMatrix(XlaOp keys, XlaOp rows, const StepOperands& in) {
  XlaBuilder* const b = keys.builder();
  const auto grid = [&in](XlaOp values, int64_t dimension) {
    return xla::BroadcastInDim(values, {in.batch, in.batch}, {dimension});
  };
  const XlaOp place = xla::Iota(b, xla::S32, in.batch);
  const XlaOp same = xla::Eq(grid(keys, 0), grid(keys, 1));
  const XlaOp later = xla::And(same, xla::Gt(grid(place, 1), grid(place, 0)));
  const XlaOp any_later = xla::Reduce(later, xla::ConstantR0<bool>(b, false),
                                      xla::CreateScalarOrComputation(xla::PRED, b), {1});
  const XlaOp ones = xla::ConvertElementType(same, in.center_type);
  xla::PrecisionConfig exact;  // or a GPU may round the rows to ten bits
  exact.add_operand_precision(xla::PrecisionConfig::HIGHEST);
  exact.add_operand_precision(xla::PrecisionConfig::HIGHEST);
  return {keys, xla::Not(any_later), SumOf(ones, in.center_type, {1}),
          xla::Dot(ones, rows, &exact)};
}

absl::StatusOr<Groups> GroupBySorting(XlaOp keys, XlaOp rows, const StepOperands& in) {
  XlaBuilder* const b = keys.builder();
  const XlaOp sorted =
      xla::Sort({keys, xla::Iota(b, xla::S32, in.batch)},
                xla::CreateScalarLtComputation({xla::S64, xla::S32}, b), 0, /*is_stable=*/true);
  keys = xla::GetTupleElement(sorted, 0);
  rows = RowsOf(rows, xla::GetTupleElement(sorted, 1), in.dim);

  const auto same_run = [&in](XlaOp keys, XlaOp shift) {
    const XlaOp position = xla::Iota(keys.builder(), xla::S64, in.batch);
    return xla::And(xla::Ge(position, shift), xla::Eq(keys, Shifted(keys, shift, in.batch)));
  };
  const auto condition = [](absl::Span<const XlaOp> state,
                            XlaBuilder* loop) -> absl::StatusOr<XlaOp> {
    return xla::ReduceAll(state[1], xla::ConstantR0<bool>(loop, false),
                          xla::CreateScalarOrComputation(xla::PRED, loop));
  };
  const auto body = [&](absl::Span<const XlaOp> state,
                        XlaBuilder*) -> absl::StatusOr<std::vector<XlaOp>> {
    const XlaOp shift = state[0], same = state[1], keys = state[2], n = state[3], sums = state[4];
    const XlaOp twice = shift + shift;
    return std::vector<XlaOp>{
        twice, same_run(keys, twice), keys, n + ZeroUnless(same, Shifted(n, shift, in.batch)),
        sums + ZeroUnless(AlongRows(same, in), Shifted(sums, shift, in.batch))};
  };
  const XlaOp one = Int64(b, 1);
  const XlaOp ones = xla::Broadcast(xla::One(b, in.center_type), {in.batch});
  const absl::StatusOr<std::vector<XlaOp>> state = xla::WhileLoopHelper(
      condition, body, {one, same_run(keys, one), keys, ones, rows}, "sums_of_runs", b);
  if (!state.ok()) return state.status();
  const XlaOp differs = xla::Ne(xla::SliceInDim(keys, 0, in.batch - 1, 1, 0),
                                xla::SliceInDim(keys, 1, in.batch, 1, 0));
  const XlaOp last =
      xla::ConcatInDim(b, {differs, xla::Broadcast(xla::ConstantR0<bool>(b, true), {1})}, 0);
  return Groups{keys, last, (*state)[3], (*state)[4]};
}

}  // namespace

absl::StatusOr<StepResults> StepInHlo(const StepKind& kind, const StepOperands& in) {
  XlaBuilder* const b = in.features.builder();
  const auto as_center = [&in](XlaOp value) {
    return xla::ConvertElementType(value, in.center_type);
  };
  const XlaOp zero = xla::Zero(b, in.center_type), one = xla::One(b, in.center_type);
  const XlaOp nan = xla::NanValue(b, in.center_type);

  const XlaOp labels = xla::ConvertElementType(in.labels, xla::S64);
  const XlaOp counted = kind.has_ignore_label
                            ? xla::Ne(labels, Int64(b, kind.ignore_label))
                            : xla::Broadcast(xla::ConstantR0<bool>(b, true), {in.batch});
  const XlaOp in_range =
      xla::And(xla::Ge(labels, Int64(b, 0)), xla::Lt(labels, Int64(b, in.classes)));
  const XlaOp valid = xla::And(counted, in_range);
  // At least one, which changes nothing where there are none: their sums are zero.
  const XlaOp total =
      xla::Max(as_center(SumOf(xla::ConvertElementType(counted, xla::S64), xla::S64, {0})), one);
  const XlaOp good_alpha = xla::And(xla::IsFinite(in.alpha), xla::Ge(in.alpha, zero));

  XlaOp residual = as_center(in.features);
  const XlaOp finite = xla::Reduce(xla::IsFinite(residual), xla::ConstantR0<bool>(b, true),
                                   xla::CreateScalarAndComputation(xla::PRED, b), {1});
  if (!kind.from_residual) {
    residual = residual - RowsOf(in.centers, ZeroUnless(valid, labels), in.dim);
    residual =
        xla::Select(AlongRows(in_range, in), residual, xla::Broadcast(nan, {in.batch, in.dim}));
    residual = ZeroUnless(AlongRows(counted, in), residual);
  }

  StepResults out;
  out.centers = in.centers;
  if (kind.has_loss) {
    const bool mean = kind.reduction == Reduction::kMean;
    const XlaOp weight = kind.moves ? xla::Select(good_alpha, in.weight, nan) : in.weight;
    out.squared_distance = SumOf(residual * residual, in.center_type, {1});
    XlaOp loss = out.squared_distance * xla::ScalarLike(zero, 0.5);
    XlaOp factor = xla::Broadcast(mean ? weight / total : weight, {in.batch});
    if (in.sample_weight) {
      loss = loss * ZeroUnless(counted, *in.sample_weight);
      factor = factor * ZeroUnless(counted, *in.sample_weight);
    }
    if (kind.reduction == Reduction::kNone) {
      out.loss = loss * weight;
    } else {
      // In double, so that the order of the sum does not show in the result.
      const auto as_double = [](XlaOp x) { return xla::ConvertElementType(x, xla::F64); };
      const XlaOp sum = SumOf(as_double(loss), xla::F64, {0}) * as_double(weight);
      out.loss = as_center(mean ? sum / as_double(total) : sum);
    }
    out.residual_bits =
        xla::BitcastConvertType(residual * AlongRows(factor, in), BitsOf(in.center_type));
  }
  if (!kind.moves || in.batch == 0) return out;

  XlaOp moving = xla::And(valid, finite);
  for (const XlaOp value : in.after) {
    moving = xla::And(moving, xla::Broadcast(TrueAfter(value), {in.batch}));
  }
  const XlaOp nowhere = Int64(b, in.classes);
  const XlaOp keys = xla::Select(moving, labels, xla::Broadcast(nowhere, {in.batch}));
  const XlaOp residuals = ZeroUnless(AlongRows(moving, in), residual);
  const absl::StatusOr<Groups> groups = in.batch <= kMatrixBatch
                                            ? GroupByMatrix(keys, residuals, in)
                                            : GroupBySorting(keys, residuals, in);
  if (!groups.ok()) return groups.status();
  const XlaOp scales = StepScales(kind.rule, in.alpha, groups->n, total);
  const XlaOp steps =
      ZeroUnless(xla::Broadcast(xla::And(good_alpha, xla::Ne(in.alpha, zero)), {in.batch, in.dim}),
                 groups->sums * AlongRows(scales, in));
  // The other places go past the table, each to a place of its own, and are dropped.
  const XlaOp rows =
      xla::Select(groups->last, groups->keys, nowhere + xla::Iota(b, xla::S64, in.batch));
  out.centers = AddToRows(in.centers, rows, steps, in.center_type);
  return out;
}

}  // namespace tcl
