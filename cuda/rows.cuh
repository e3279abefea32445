// What a warp does with the samples: residuals, losses, sums of residuals, centers.

#ifndef TF_CENTER_LOSS_OP_CUDA_ROWS_CUH_
#define TF_CENTER_LOSS_OP_CUDA_ROWS_CUH_

#include <cstdint>

#include "csrc/center_loss_math.h"
#include "cuda/device.cuh"
#include "cuda/label_ranks.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// What the warps do with the samples.
template <typename Feature, int Width>
class Rows {
 public:
  using Center = CenterType<Feature>;
  static constexpr int kLane = kPerLane<Center, Width>;
  static constexpr int kPass = kColumns<Center, Width>;
  using Piece = Center[kLane];                  // this lane's share of kPass columns
  static constexpr int kUnit = kWarp * Width;   // columns that a warp has one vector of
  static constexpr int kGroup = kLane / Width;  // vectors of a Piece
  // Vectors in flight where only one vector of the center is held, too, or nothing else. Those of
  // float64 come with sums that take pairs of registers.
  static constexpr int kLoads = sizeof(Center) == 8 ? 4 : 6;
  static constexpr int kMostLoads = sizeof(Center) == 8 ? 8 : 16;

  __device__ explicit Rows(const Parameters<Feature>& p) : p_(p) {
    const Center alpha = Alpha();
    moves_ = p.options.update_centers && IsFinite(alpha) && alpha > 0;
  }

  // Whether any center moves; with alpha = 0 none does, so none is touched.
  __device__ bool moves() const { return moves_; }

  __device__ void SetCounted(int counted) {
    counted_ = counted;
    sample_scale_ = ReductionScale(p_.options.reduction, Weight(), counted);
  }

  // Fetch what a sample needs, ahead of the look-up of its class.
  __device__ void PrefetchFeatures(int i) const {
    if (i < p_.batch) PrefetchRow(p_.Features(i), p_.dim);
  }
  __device__ void PrefetchCenter(int64_t label) const {
    if (p_.InTable(label)) PrefetchRow(p_.CenterRow(label), p_.dim);
  }

  // A sample that is the only one of its class, or of no class, or one of many where no center
  // moves.
  __device__ void DoAlone(int i, int64_t label) {
    if (p_.Ignored(label)) {
      Without(i, 0);
    } else if (!p_.InTable(label)) {
      Without(i, NotANumber());
    } else {
      DoChunk(label, {1, i}, moves_ ? Sums::kMove : Sums::kNone, nullptr);
    }
  }

  // The piece of the sample of index.SetClass(), see Pieces.
  template <typename Index>
  __device__ void DoPiece(Index& index) {
    const Pieces pieces(index.count(), p_.parts);
    const int piece = index.rank() / pieces.stride;
    const int chunk = piece / pieces.parts;
    const int first = chunk * kMembers;
    const Members members = index.Find(first, min(index.count() - first, kMembers));
    if (index.count() <= kWholeMembers) {
      DoChunk(index.label(), members, Sums::kMove, nullptr);
      return;
    }
    const int part = piece % pieces.parts;
    const int pool_row = index.FirstPoolRow();
    DoPart(index.label(), members, part, pool_row + chunk);
    const int node = chunk / kMembers * kMembers;  // its first chunk
    const int children = min(pieces.chunks - node, kMembers);
    // The first lane arrives at the chunk, the second at the node's part.
    const bool at_chunk = Lane() == 0;
    int* const counter =
        at_chunk ? Arrivals(kAtChunk, pool_row + chunk) : Arrivals(kAtPart + part, pool_row + node);
    const unsigned last = LastAt(Lane() < 2 ? counter : nullptr, at_chunk ? p_.parts : children);
    if (last & 1) FinishChunk(members);
    if ((last & 2) == 0) return;
    SumRows(pool_row + node, children, 1, part * p_.part_columns, p_.part_columns);
    if (!LastWarpToArrive(Arrivals(kAtNode, pool_row + node), p_.parts)) return;
    const int finite = FinishNode(index.label(), index.count(), node, children, pool_row);
    Climb(index.label(), pieces.chunks, node, pool_row, finite);
  }

  // One sample of a class of several, without an order: adds its residual to the row of the class.
  __device__ void AddAtomically(int i, int64_t label, int group, int members) {
    const int row = __ldcg(&p_.first_pool_row[group]);
    Center* const sum = p_.PoolAt(row);
    const int count = DoChunk(label, {1, i}, Sums::kAdd, sum);
    if (Lane() == 0 && count > 0) atomicAdd(&p_.finite_count[row], count);
    if (!LastWarpToArrive(Arrivals(kAtChunk, row), members)) return;
    const int finite = __ldcg(&p_.finite_count[row]);
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Piece total, center, zeros;
      LoadRow<Width, Cache::kShared>(sum, column, p_.dim, total);
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      MoveCenter(label, column, finite, total, center);
#pragma unroll
      for (int e = 0; e < kLane; ++e) zeros[e] = 0;
      StoreRow<Width, Cache::kNormal>(sum, column, p_.dim, zeros);
    }
  }

  // Whether the losses go into boxes, for their sum.
  __device__ bool reduces_loss() const {
    return p_.loss != nullptr && p_.options.reduction != Reduction::kNone;
  }

  // The loss, of the sum of the samples' losses; by one thread.
  __device__ void StoreLossSum(double sum) {
    sum *= static_cast<double>(Weight());
    if (p_.options.reduction == Reduction::kMean) {
      sum = counted_ == 0 ? 0 : sum / static_cast<double>(counted_);
    }
    *p_.loss = static_cast<Center>(sum);
  }

  __device__ static Center NotANumber() { return static_cast<Center>(FloatOf(0x7fc00000u)); }

 private:
  // An ignored sample, or one whose label is no row of the table.
  __device__ void Without(int i, Center value) {
    if (p_.residual != nullptr) {
      Piece row;
#pragma unroll
      for (int e = 0; e < kLane; ++e) row[e] = value;
#pragma unroll 1
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, row);
      }
    }
    if (Lane() == 0) StoreLoss(i, value, value);
  }

  // Both are read again and again: there are no registers to keep them in.
  __device__ Center Alpha() const {
    return p_.cuda.alpha == nullptr ? p_.options.alpha : *p_.cuda.alpha;
  }
  __device__ Center Weight() const {
    // No kernel can raise: a bad alpha shows in the loss.
    if (p_.options.update_centers && !(IsFinite(Alpha()) && Alpha() >= 0)) return NotANumber();
    return p_.cuda.weight == nullptr ? p_.options.weight : *p_.cuda.weight;
  }

  // What becomes of the sum of a chunk's residuals.
  enum class Sums { kNone, kMove, kAdd };

  // Does the members, which lie in the lanes, by whole rows. Returns how many of them are finite.
  __device__ int DoChunk(int64_t label, Members members, Sums sums, Center* sum_row) {
    const Center sample_weight = SampleWeight(members);
    Center squares = 0;  // ||d||^2 of this lane's member
    // A row longer than kPass has to be gone through before any of it may be added up.
    const bool whole_rows = p_.dim <= kPass;
    unsigned finite = kAllLanes;
    if (!whole_rows && sums != Sums::kNone) finite = FiniteMembers(members);

    PrefetchMembers(members, 2, 0, p_.dim);
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Piece center, sum, row, next;
#pragma unroll
      for (int e = 0; e < kLane; ++e) center[e] = sum[e] = next[e] = 0;
      LoadMember(members, 0, column, row);
      if (!p_.features_are_residuals) {
        LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      }
      for (int m = 0; m < members.count; ++m) {
        if (m + 1 < members.count) LoadMember(members, m + 1, column, next);
        if (whole_rows && !__all_sync(kAllLanes, AllFinite<kLane>(row))) finite &= ~(1u << m);
        const Center square = WarpSum(Subtract<kLane>(center, finite >> m & 1, row, sum));
        if (Lane() == m) squares += square;
        if (p_.residual != nullptr) {
          const Center scale = __shfl_sync(kAllLanes, sample_weight, m) * sample_scale_;
#pragma unroll
          for (int e = 0; e < kLane; ++e) row[e] *= scale;
          StoreRow<Width, Cache::kStreamed>(ResidualOf(members, m), column, p_.dim, row);
        }
#pragma unroll
        for (int e = 0; e < kLane; ++e) row[e] = next[e];
      }
      const int count = FiniteCount(finite, members);
      if (sums == Sums::kMove) {
        if (p_.features_are_residuals) {  // which need no center
          LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
        }
        MoveCenter(label, column, count, sum, center);
      }
      if (sums == Sums::kAdd && count > 0) AddRow(sum_row, column, sum);
    }
    StoreLosses(members, sample_weight, squares);
    return FiniteCount(finite, members);
  }

  // Does part `part` of a chunk, whose sum has a row of the pool. One vector of a row leaves
  // registers for several members at a time, which are gone through without a branch, side by side.
  __device__ void DoPart(int64_t label, Members members, int part, int pool_row) {
    const Center sample_weight = SampleWeight(members);
    Center squares = 0;
    unsigned finite = kAllLanes;
    const int64_t begin = part * p_.part_columns;
    const int64_t end = min(begin + p_.part_columns, p_.dim);
    PrefetchMembers(members, kLoads, begin, end);
#pragma unroll 1
    for (int64_t column = begin; column < end; column += kUnit) {
      // A lane beyond the end of the row goes along, at a column that is there.
      const bool in_row = ColumnOf<Width>(column, 0) < p_.dim;
      const int64_t at = in_row ? ColumnOf<Width>(column, 0) : 0;
      Center center[Width] = {}, sum[Width] = {};
      Center rows[kLoads * Width];
      LoadMembers(members, 0, at, rows);
      if (!p_.features_are_residuals) {
        LoadVector<Width, Cache::kNormal>(p_.CenterRow(label) + at, center);
      }
#pragma unroll 1
      for (int first = 0; first < members.count; first += kLoads) {
        Center square[kLoads];
#pragma unroll
        for (int v = 0; v < kLoads; ++v) {
          Center* const row = rows + v * Width;
          const bool all_finite = __all_sync(kAllLanes, AllFinite<Width>(row) || !in_row);
          if (!all_finite) finite &= ~(1u << (first + v));
          square[v] = Subtract<Width>(center, first + v < members.count, row, sum);
          if (!in_row) square[v] = 0;
        }
        WarpSums(square);
#pragma unroll
        for (int v = 0; v < kLoads; ++v) {
          if (Lane() == first + v) squares += square[v];
        }
        if (p_.residual != nullptr) {
#pragma unroll
          for (int v = 0; v < kLoads; ++v) {
            const int m = first + v;
            const Center scale = __shfl_sync(kAllLanes, sample_weight, m) * sample_scale_;
            Center* const row = rows + v * Width;
#pragma unroll
            for (int e = 0; e < Width; ++e) row[e] *= scale;
            Center* const residual = ResidualOf(members, m);
            if (m < members.count && in_row) {
              StoreVector<Width, Cache::kStreamed>(residual + at, row);
            }
          }
        }
        if (first + kLoads < members.count) LoadMembers(members, first + kLoads, at, rows);
      }
      if (in_row) StoreVector<Width, Cache::kNormal>(p_.PoolAt(pool_row) + at, sum);
    }
    if (Lane() < members.count) p_.part_squares[part * p_.batch + members.position] = squares;
    if (Lane() == 0) p_.part_finite[pool_row * kParts + part] = finite;
    if (part == 0 && Lane() < members.count) {
      p_.chunk_members[pool_row * kMembers + Lane()] = members.position;
    }
  }

  // Once all parts of a chunk are done: the losses.
  __device__ void FinishChunk(Members members) {
    Center squares = 0;
#pragma unroll 1
    for (int part = 0; part < p_.parts && Lane() < members.count; ++part) {
      squares += __ldcg(&p_.part_squares[part * p_.batch + members.position]);
    }
    StoreLosses(members, SampleWeight(members), squares);
  }

  // Once all parts of a node, of the chunks from `node` on, are summed; `all` is the count of the
  // class. Returns how many samples of the node are finite. What is not finite in one part must not
  // be in the sum of another either.
  __device__ int FinishNode(int64_t label, int all, int node, int children, int pool_row) {
    unsigned finite = kAllLanes;  // of the chunk that is this lane's number
    if (Lane() < children) {
#pragma unroll 1
      for (int part = 0; part < p_.parts; ++part) {
        finite &= __ldcg(&p_.part_finite[(pool_row + node + Lane()) * kParts + part]);
      }
    }
    const int samples = Lane() < children ? min(all - (node + Lane()) * kMembers, kMembers) : 0;
    const int count = __popc(finite & ((1u << samples) - 1));
    unsigned again = __ballot_sync(kAllLanes, count < samples);
    if (again != 0) {
      // The first chunk's sum, too: the node's lies in its place.
      for (again |= 1; again != 0; again &= again - 1) {
        const int child = __ffs(static_cast<int>(again)) - 1;
        StoreSum(label, __shfl_sync(kAllLanes, samples, child),
                 __shfl_sync(kAllLanes, finite, child), pool_row + node + child);
      }
      SumRows(pool_row + node, children, 1, 0, p_.dim);
    }
    return WarpSum(count);
  }

  // The sum of the residuals of a chunk's finite members, one after the other: seldom needed.
  __device__ void StoreSum(int64_t label, int samples, unsigned finite, int pool_row) {
#pragma unroll 1
    for (int64_t at = ColumnOf<Width>(0, 0); at < p_.dim; at += kUnit) {
      Center center[Width] = {}, sum[Width] = {};
      if (!p_.features_are_residuals) {
        LoadVector<Width, Cache::kNormal>(p_.CenterRow(label) + at, center);
      }
#pragma unroll 1
      for (int m = 0; m < samples; ++m) {
        const int i = __ldcg(&p_.chunk_members[pool_row * kMembers + m]);
        Center row[Width];
        LoadVector<Width, Cache::kNormal>(p_.Features(i) + at, row);
        Subtract<Width>(center, finite >> m & 1, row, sum);
      }
      StoreVector<Width, Cache::kNormal>(p_.PoolAt(pool_row) + at, sum);
    }
  }

  __device__ Center SampleWeight(Members members) const {
    if (p_.sample_weight == nullptr || Lane() >= members.count) return 1;
    return p_.sample_weight[members.position];
  }

  __device__ Center* ResidualOf(Members members, int m) const {
    return p_.residual + __shfl_sync(kAllLanes, members.position, m) * p_.dim;
  }

  // The residual in place of the features, and added to the sum. Returns its squares.
  template <int Count>
  __device__ static Center Subtract(const Center* center, bool adds, Center* row, Center* sum) {
    Center square = 0;
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      row[e] -= center[e];
      square += row[e] * row[e];
      sum[e] += adds ? row[e] : Center{0};
    }
    return square;
  }

  // Of those from `first` on: not loaded yet, but on their way.
  __device__ void PrefetchMembers(Members members, int first, int64_t begin, int64_t end) const {
#pragma unroll 1
    for (int m = first; m < members.count; ++m) {
      const int i = __shfl_sync(kAllLanes, members.position, m);
      PrefetchRow(p_.Features(i) + begin, end - begin);
    }
  }

  __device__ void LoadMember(Members members, int m, int64_t column, Piece& row) {
    const int i = __shfl_sync(kAllLanes, members.position, m);
    LoadRow<Width, Cache::kStreamed>(p_.Features(i), column, p_.dim, row);
  }

  // This lane's vector at column `at` of kLoads members, from `first` on; beyond the last, of that
  // one again. No load has a condition: it would be waited for before the next.
  __device__ void LoadMembers(Members members, int first, int64_t at, Center* rows) {
    int position[kLoads];
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      const int m = min(first + v, members.count - 1);
      position[v] = __shfl_sync(kAllLanes, members.position, m);
    }
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      LoadVector<Width, Cache::kStreamed>(p_.Features(position[v]) + at, rows + v * Width);
    }
  }

  template <int Count>
  __device__ static bool AllFinite(const Center* row) {
    bool finite = true;
#pragma unroll
    for (int e = 0; e < Count; ++e) finite = finite && IsFinite(row[e]);
    return finite;
  }

  __device__ unsigned FiniteMembers(Members members) {
    unsigned finite = 0;
    for (int m = 0; m < members.count; ++m) {
      const int i = __shfl_sync(kAllLanes, members.position, m);
      bool row_is_finite = true;
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        Piece row;
        LoadRow<Width, Cache::kNormal>(p_.Features(i), column, p_.dim, row);
        row_is_finite = row_is_finite && AllFinite<kLane>(row);
      }
      if (__all_sync(kAllLanes, row_is_finite)) finite |= 1u << m;
    }
    return finite;
  }

  __device__ static int FiniteCount(unsigned finite, Members members) {
    return __popc(finite & ((1u << members.count) - 1));
  }

  __device__ void MoveCenter(int64_t label, int64_t column, int count, const Piece& sum,
                             Piece& center) {
    if (count == 0) return;
    const Center scale = StepScale(p_.options.rule, Alpha(), count, counted_);
#pragma unroll
    for (int e = 0; e < kLane; ++e) center[e] += scale * sum[e];
    StoreRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
  }

  __device__ void AddRow(Center* row, int64_t column, const Piece& in) {
#pragma unroll
    for (int v = 0; v < kGroup; ++v) {
      const int64_t at = ColumnOf<Width>(column, v);
      if (at >= p_.dim) continue;
      AddVector<Width>(row + at, in + v * Width);
    }
  }

  // Up the tree from a node that is finished, as far as this warp is the last to arrive. The pool's
  // row of a node is that of its first chunk.
  __device__ void Climb(int64_t label, int chunks, int node, int pool_row, int finite) {
    int level = kAtNextNode;
#pragma unroll 1
    for (int width = kMembers; width < chunks; width *= kMembers, ++level) {
      if (Lane() == 0) p_.finite_count[pool_row + node] = finite;
      node = node / width / kMembers * kMembers * width;
      const int row = pool_row + node;
      const int children = min((chunks - node + width - 1) / width, kMembers);
      if (!LastWarpToArrive(Arrivals(level, row), children)) return;
      finite = WarpSum(Lane() < children ? __ldcg(&p_.finite_count[row + Lane() * width]) : 0);
      SumRows(row, children, width, 0, p_.dim);
    }
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Piece sum, center;
      LoadRow<Width, Cache::kShared>(p_.PoolAt(pool_row), column, p_.dim, sum);
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      MoveCenter(label, column, finite, sum, center);
    }
  }

  __device__ int* Arrivals(int level, int row) const {
    return p_.arrivals + level * p_.pool_rows + row;
  }

  // Adds up so many rows of the pool, `step` apart, in the first of them: `columns` columns from
  // `begin` on.
  __device__ void SumRows(int row, int count, int step, int64_t begin, int64_t columns) {
    if (count == 1) return;
    const int64_t end = min(begin + columns, p_.dim);
#pragma unroll 1
    for (int64_t at = ColumnOf<Width>(begin, 0); at < end; at += kUnit) {
      Center sum[Width] = {};
#pragma unroll 1
      for (int k = 0; k < count; k += kMostLoads) {
        Center rows[kMostLoads][Width];
#pragma unroll
        for (int v = 0; v < kMostLoads; ++v) {  // without a condition, see LoadMembers
          const Center* const from = p_.PoolAt(row + min(k + v, count - 1) * step);
          LoadVector<Width, Cache::kShared>(from + at, rows[v]);
        }
#pragma unroll
        for (int v = 0; v < kMostLoads; ++v) {
#pragma unroll
          for (int e = 0; e < Width; ++e) sum[e] += k + v < count ? rows[v][e] : Center{0};
        }
      }
      StoreVector<Width, Cache::kNormal>(p_.PoolAt(row) + at, sum);
    }
  }

  __device__ void StoreLosses(Members members, Center sample_weight, Center squares) {
    if (Lane() >= members.count) return;
    StoreLoss(members.position, sample_weight * (squares / 2), squares);
  }

  __device__ void StoreLoss(int i, Center loss, Center squares) {
    if (reduces_loss()) {
      Fill(&p_.sample_loss[i], loss);
    } else if (p_.loss != nullptr) {
      p_.loss[i] = loss * sample_scale_;
    }
    if (p_.squared_distance != nullptr) p_.squared_distance[i] = squares;
  }

  const Parameters<Feature>& p_;
  Center sample_scale_ = 0;
  int counted_ = 0;
  bool moves_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_ROWS_CUH_
