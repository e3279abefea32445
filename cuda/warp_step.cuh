// The step on the samples of one warp: residuals, losses, sums of residuals, centers.

#ifndef TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_
#define TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_

#include <cstdint>

#include "csrc/center_loss_math.h"
#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// kLoads: vectors of members whose loads are in flight together.
template <typename Feature, int Width, int kLoads>
class WarpStep {
 public:
  using Center = CenterType<Feature>;
  static constexpr int kLane = kPerLane<Center, Width>;
  static constexpr int kPass = kColumns<Center, Width>;
  static constexpr int kVectors = kLane / Width;
  static constexpr int kStride = kWarp * Width;  // columns of which a warp has one vector each
  using Share = Center[kLane];  // of a pass over the columns, this lane's numbers

  // Each warp has one of these in shared memory, for the chunk that it does.
  struct Shared {
    Center sum[kPass];      // of the residuals, where rows have no more columns
    Center weight[kLight];  // of each member
    int members[kLight];    // positions in the batch
  };

  __device__ WarpStep(const Parameters<Feature>& p, unsigned char* shared)
      : p_(p), shared_(reinterpret_cast<Shared*>(shared)[WarpOfBlock()]) {
    const Center alpha = Alpha();
    moves_ = p.options.update_centers && IsFinite(alpha) && alpha > 0;
  }

  static __host__ __device__ int64_t SharedBytes(int threads) {
    return threads / kWarp * static_cast<int64_t>(sizeof(Shared));
  }

  // Where the members of a chunk go, for DoChunk.
  __device__ int* members() { return shared_.members; }

  // Whether any center moves. With alpha = 0 none does, so none is written.
  __device__ bool moves() const { return moves_; }

  // Whether the sample belongs to a class whose center moves.
  __device__ bool IsMember(int64_t label) const {
    return moves_ && !p_.Ignored(label) && p_.InTable(label);
  }

  __device__ void SetCounted(int counted) {
    counted_ = counted;
    sample_scale_ = ReductionScale(p_.options.reduction, Weight(), counted);
  }

  // Whether the losses go into mailboxes, to be added up.
  __device__ bool reduces_loss() const {
    return p_.loss != nullptr && p_.options.reduction != Reduction::kNone;
  }

  // Prefetches what a sample needs; a sample for each lane.
  __device__ void Prefetch(int i, int64_t label) const {
    constexpr bool kVectorRows = Width > 1;
    PrefetchRow<kVectorRows>(p_.Features(i), p_.dim * static_cast<int64_t>(sizeof(Feature)));
    if (!p_.InTable(label)) return;
    PrefetchRow<kVectorRows>(p_.CenterRow(label), p_.dim * static_cast<int64_t>(sizeof(Center)));
  }

  // A sample's features and center in one pass over the columns.
  struct Loaded {
    Share row;
    Share center;
  };

  // kEarly: it is not known yet whether another warp moves this center.
  template <bool kEarly>
  __device__ void Load(int i, int64_t label, int64_t column, Loaded* loaded) const {
    LoadRow<Width, Cache::kStreamed>(p_.Features(i), column, p_.dim, loaded->row);
    const bool subtracts = !p_.features_are_residuals && p_.InTable(label);
    LoadRow<Width, kEarly ? Cache::kEarly : Cache::kNormal>(
        subtracts ? p_.CenterRow(label) : nullptr, column, subtracts ? p_.dim : 0, loaded->center);
  }

  // What becomes of a sum of residuals.
  enum class Sum { kUnused, kMovesCenter, kStored, kAddedAtomically };

  // A sample by itself: the only one of its class; or of no class; or one of many where no center
  // moves or atomics add them up in `pool_row`. `loaded`: its first pass. Returns how many finite
  // samples it is.
  __device__ int DoAlone(int i, int64_t label, Loaded& loaded, Sum use, int pool_row = 0) {
    if (p_.Ignored(label)) return DoWithout(i, 0);
    if (!p_.InTable(label)) return DoWithout(i, NotANumber());
    const Center weight = p_.sample_weight == nullptr ? Center{1} : p_.sample_weight[i];
    const Center scale = weight * sample_scale_;
    Center square = 0;
#pragma unroll 1
    for (int64_t column = 0;;) {
      Share scaled;
#pragma unroll
      for (int e = 0; e < kLane; ++e) {
        loaded.row[e] -= loaded.center[e];
        square += loaded.row[e] * loaded.row[e];
        scaled[e] = loaded.row[e] * scale;
      }
      if (p_.residual != nullptr) {
        StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, scaled);
      }
      column += kPass;
      if (column >= p_.dim) break;
      Load<false>(i, label, column, &loaded);
    }
    square = WarpSum(square);
    if (Lane() == 0) StoreLoss(i, weight * (square / 2), square);
    if (use == Sum::kUnused || !(IsFinite(square) || RowIsFinite(i))) return 0;
    if (p_.dim <= kPass) {
      UseShare(use, label, 0, loaded, pool_row);
      return 1;
    }
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Load<false>(i, label, column, &loaded);
#pragma unroll
      for (int e = 0; e < kLane; ++e) loaded.row[e] -= loaded.center[e];
      UseShare(use, label, column, loaded, pool_row);
    }
    return 1;
  }

  // The `count` samples of one class in members(), up to kLight: residuals and losses. Their sum moves
  // the center or is stored in `pool_row`. Returns how many of them are finite.
  __device__ int DoMembers(int64_t label, int count, Sum use, int pool_row) {
    __syncwarp();  // the members are there
    const int own = shared_.members[min(Lane(), count - 1)];
    const Center weight = p_.sample_weight == nullptr ? Center{1} : p_.sample_weight[own];
    if (Lane() < kLight) shared_.weight[Lane()] = weight;
    __syncwarp();
    // A pair, the most common class of several, is done in as few passes as a sample alone.
    const Center squares = count <= 2 ? DoSideBySide<2>(label, count) : DoSideBySide<kChunk>(label, count);
    if (Lane() < count) StoreLoss(own, weight * (squares / 2), squares);

    const unsigned finite = FiniteMembers(count, squares);
    const int finite_count = __popc(finite);
    const bool has_sum = p_.dim <= kPass && finite_count == count;
    if (use == Sum::kMovesCenter && finite_count == 0) return 0;
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
#pragma unroll 1
      for (int v = 0; v < kVectors && !has_sum; ++v) {
        const int64_t at = ColumnOf<Width>(column, v);
        if (at < p_.dim) AddUp(label, count, finite, at, at - column);
      }
      Share sum, center = {};
      LoadRow<Width, Cache::kNormal>(shared_.sum, 0, p_.dim - column, sum);
      if (use == Sum::kStored) {
        StoreRow<Width, Cache::kNormal>(p_.PoolRow(pool_row), column, p_.dim, sum);
        continue;
      }
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      const Center scale = Scale(finite_count);
#pragma unroll
      for (int e = 0; e < kLane; ++e) center[e] += scale * sum[e];
      StoreRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
    }
    __syncwarp();  // the next members may come
    return finite_count;
  }

  // One sample of a class of `count` whose sum is a row of the pool; the last one moves the center
  // and clears the row.
  __device__ void AddAtomically(int i, int64_t label, Loaded& loaded, int count, int row) {
    const int added = DoAlone(i, label, loaded, Sum::kAddedAtomically, row);
    if (Lane() == 0 && added > 0) atomicAdd(&p_.finite_count[row], added);
    if (!LastWarpToArrive(p_.arrivals + row, count)) return;
    const int finite = __ldcg(&p_.finite_count[row]);
    for (int64_t at = ColumnOf<Width>(0, 0); at < p_.dim; at += kStride) {
      Center sum[Width];
      const Center zeros[Width] = {};
      LoadVector<Width, Cache::kShared>(p_.PoolRow(row) + at, sum);
      StoreVector<Width, Cache::kNormal>(p_.PoolRow(row) + at, zeros);
      if (finite > 0) MoveCenter(label, at, Scale(finite), sum);
    }
  }

  // Moves this lane's vector of a center at column `at`.
  __device__ void MoveCenter(int64_t label, int64_t at, Center scale, const Center (&sum)[Width]) {
    Center center[Width];
    LoadVector<Width, Cache::kNormal>(p_.CenterRow(label) + at, center);
#pragma unroll
    for (int e = 0; e < Width; ++e) center[e] += scale * sum[e];
    StoreVector<Width, Cache::kNormal>(p_.CenterRow(label) + at, center);
  }

  // What the sum of the residuals of a class of `finite` samples is multiplied by.
  __device__ Center Scale(int finite) const {
    return StepScale(p_.options.rule, Alpha(), finite, counted_);
  }

  // The loss, of the sum of the samples' losses; by one thread.
  __device__ void StoreLossSum(double sum) {
    sum *= static_cast<double>(Weight());
    if (p_.options.reduction == Reduction::kMean) {
      sum = counted_ == 0 ? 0 : sum / static_cast<double>(counted_);
    }
    *p_.loss = static_cast<Center>(sum);
  }

 private:
  __device__ static Center NotANumber() { return static_cast<Center>(FloatOf(0x7fc00000u)); }

  // Alpha and weight are loaded each time: that costs less than the registers to keep them.
  __device__ Center Alpha() const {
    return p_.cuda.alpha == nullptr ? p_.options.alpha : *p_.cuda.alpha;
  }
  __device__ Center Weight() const {
    // A kernel cannot raise: a bad alpha shows in the loss.
    if (p_.options.update_centers && !(IsFinite(Alpha()) && Alpha() >= 0)) return NotANumber();
    return p_.cuda.weight == nullptr ? p_.options.weight : *p_.cuda.weight;
  }

  // An ignored sample, or one whose label is no row of the table.
  __device__ int DoWithout(int i, Center value) {
    if (p_.residual != nullptr) {
      Share row;
#pragma unroll
      for (int e = 0; e < kLane; ++e) row[e] = value;
#pragma unroll 1
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, row);
      }
    }
    if (Lane() == 0) StoreLoss(i, value, value);
    return 0;
  }

  // Residuals of the members, kSide of them side by side; their sum, where a row is one pass, in
  // shared memory. Returns the squares of the member in this lane.
  template <int kSide>
  __device__ Center DoSideBySide(int64_t label, int count) {
    constexpr int kVec = kLoads / kSide < 2 ? 1 : 2;
    const bool keeps_sum = p_.dim <= kPass;
    Center squares = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kSide) {
      Center square[kSide] = {};
#pragma unroll 1
      for (int64_t column = 0; column < p_.dim; column += kVec * kStride) {
        Center rows[kVec][kSide][Width], center[kVec][Width] = {};
        int64_t at[kVec];
        bool in_row[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          // Beyond the end of the row its begin again, and beyond the last member the last again:
          // no load has a condition, so all are in flight together.
          at[v] = ColumnOf<Width>(column, v);
          in_row[v] = at[v] < p_.dim;
          if (!in_row[v]) at[v] = 0;
          LoadMembers<kSide>(first, count, at[v], rows[v]);
          LoadCenter(label, at[v], center[v]);
        }
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          Center sum[Width] = {};
          if (keeps_sum && first > 0) LoadSum(at[v], sum);
#pragma unroll
          for (int m = 0; m < kSide; ++m) {
            const bool adds = first + m < count;
#pragma unroll
            for (int e = 0; e < Width; ++e) {
              rows[v][m][e] -= center[v][e];
              if (in_row[v]) square[m] += rows[v][m][e] * rows[v][m][e];
              sum[e] += adds ? rows[v][m][e] : Center{0};
            }
          }
          if (keeps_sum && in_row[v]) StoreSum(at[v], sum);
          if (p_.residual == nullptr || !in_row[v]) continue;
#pragma unroll
          for (int m = 0; m < kSide; ++m) {
            if (first + m >= count) continue;
            const Center scale = shared_.weight[first + m] * sample_scale_;
            Center* const residual = p_.residual + shared_.members[first + m] * p_.dim;
#pragma unroll
            for (int e = 0; e < Width; ++e) rows[v][m][e] *= scale;
            StoreVector<Width, Cache::kStreamed>(residual + at[v], rows[v][m]);
          }
        }
      }
      const Center all = WarpSums(square);
      if (Lane() / kSide == first / kSide) squares = all;
    }
    return squares;
  }

  // This lane's vector at column `at` of kSide members, from `first` on.
  template <int kSide>
  __device__ void LoadMembers(int first, int count, int64_t at,
                              Center (&rows)[kSide][Width]) const {
#pragma unroll
    for (int m = 0; m < kSide; ++m) {
      const int i = shared_.members[min(first + m, count - 1)];
      LoadVector<Width, Cache::kNormal>(p_.Features(i) + at, rows[m]);
    }
  }

  // The center that is subtracted: zeros where the features are residuals.
  __device__ void LoadCenter(int64_t label, int64_t at, Center (&center)[Width]) const {
    if (p_.features_are_residuals) return;
    LoadVector<Width, Cache::kNormal>(p_.CenterRow(label) + at, center);
  }

  __device__ void LoadSum(int64_t at, Center (&sum)[Width]) const {
#pragma unroll
    for (int e = 0; e < Width; ++e) sum[e] = shared_.sum[at + e];
  }
  __device__ void StoreSum(int64_t at, const Center (&sum)[Width]) {
#pragma unroll
    for (int e = 0; e < Width; ++e) shared_.sum[at + e] = sum[e];
  }

  // The same sum, of the finite members alone or of a longer row, from the features again: of this
  // lane's vector at column `at`, into place `into` of shared memory.
  __device__ void AddUp(int64_t label, int count, unsigned finite, int64_t at, int64_t into) {
    Center center[Width] = {}, sum[Width] = {};
    LoadCenter(label, at, center);
#pragma unroll 1
    for (int first = 0; first < count; first += kChunk) {
      Center rows[kChunk][Width];
      LoadMembers<kChunk>(first, count, at, rows);
#pragma unroll
      for (int m = 0; m < kChunk; ++m) {
        const bool adds = (finite >> (first + m) & 1) != 0;
#pragma unroll
        for (int e = 0; e < Width; ++e) sum[e] += adds ? rows[m][e] - center[e] : Center{0};
      }
    }
    StoreSum(into, sum);
  }

  __device__ bool RowIsFinite(int i) const {
    bool finite = true;
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Share row;
      LoadRow<Width, Cache::kNormal>(p_.Features(i), column, p_.dim, row);
#pragma unroll
      for (int e = 0; e < kLane; ++e) finite = finite && IsFinite(row[e]);
    }
    return __all_sync(kAllLanes, finite);
  }

  // The lanes whose member has finite features, as bits. Where the squares are finite so are the
  // features, so that only the other rows are read again.
  __device__ unsigned FiniteMembers(int count, Center squares) const {
    const unsigned all = (1u << count) - 1;
    unsigned finite = all & __ballot_sync(kAllLanes, IsFinite(squares));
#pragma unroll 1
    for (unsigned left = all & ~finite; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      if (RowIsFinite(shared_.members[lane])) finite |= 1u << lane;
    }
    return finite;
  }

  // A pass of the residual of a sample alone, and the center that was subtracted there.
  __device__ void UseShare(Sum use, int64_t label, int64_t column, Loaded& loaded, int pool_row) {
    if (use == Sum::kAddedAtomically) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = ColumnOf<Width>(column, v);
        if (at < p_.dim) AddVector<Width>(p_.PoolRow(pool_row) + at, loaded.row + v * Width);
      }
      return;
    }
    if (p_.features_are_residuals) {
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, loaded.center);
    }
    const Center scale = Scale(1);
#pragma unroll
    for (int e = 0; e < kLane; ++e) loaded.center[e] += scale * loaded.row[e];
    StoreRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, loaded.center);
  }

  __device__ void StoreLoss(int i, Center loss, Center squares) {
    if (reduces_loss()) {
      Publish(&p_.sample_loss[i], loss);
    } else if (p_.loss != nullptr) {
      p_.loss[i] = loss * sample_scale_;
    }
    if (p_.squared_distance != nullptr) p_.squared_distance[i] = squares;
  }

  const Parameters<Feature>& p_;
  Shared& shared_;
  Center sample_scale_ = 0;
  int counted_ = 0;
  bool moves_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_
