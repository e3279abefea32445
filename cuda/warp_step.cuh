// The step on the samples of one warp: residuals, losses, sums of residuals, centers.

#ifndef TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_
#define TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_

#include <cstdint>

#include "csrc/center_loss_math.h"
#include "cuda/device.cuh"
#include "cuda/scanned_labels.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

template <typename Feature, int Width>
class WarpStep {
 public:
  using Center = CenterType<Feature>;
  static constexpr int kLane = kPerLane<Center, Width>;
  static constexpr int kPass = kColumns<Center, Width>;
  static constexpr int kVectors = kLane / Width;
  static constexpr int kStride = kWarp * Width;  // columns of which a warp has one vector each
  // Samples of a class that are done side by side, so that their loads are in flight together.
  static constexpr int kSide = sizeof(Center) == 8 ? 4 : 8;
  // Partial sums that are loaded together.
  static constexpr int kSumLoads = sizeof(Center) == 8 ? 8 : 16;
  using Share = Center[kLane];  // of a pass over the columns, this lane's numbers

  __device__ explicit WarpStep(const Parameters<Feature>& p) : p_(p) {
    const Center alpha = Alpha();
    moves_ = p.options.update_centers && IsFinite(alpha) && alpha > 0;
  }

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

  __device__ void PrefetchFeatures(int i) const {
    PrefetchRow(p_.Features(i), p_.dim * static_cast<int64_t>(sizeof(Feature)));
  }
  __device__ void PrefetchCenter(int64_t label) const {
    if (!p_.InTable(label)) return;
    PrefetchRow(p_.CenterRow(label), p_.dim * static_cast<int64_t>(sizeof(Center)));
  }

  // A sample's features and center in the first pass.
  struct Loaded {
    Share row;
    Share center;
  };

  // `early`: it is not known yet whether another warp moves this center.
  template <bool kEarly>
  __device__ void Load(int i, int64_t label, Loaded* loaded) const {
    LoadRow<Width, Cache::kStreamed>(p_.Features(i), 0, p_.dim, loaded->row);
    LoadCenter<kEarly ? Cache::kEarly : Cache::kNormal>(label, 0, loaded->center);
  }

  // What becomes of a sum of residuals.
  enum class Sum { kUnused, kMovesCenter, kStored, kAddedAtomically };

  // A sample by itself: the only one of its class; or of no class; or one of many where no center
  // moves or atomics add them up in `pool_row`. Returns how many finite samples it is.
  __device__ int DoAlone(int i, int64_t label, Loaded& loaded, Sum use, int pool_row = 0) {
    if (p_.Ignored(label)) return DoWithout(i, 0);
    if (!p_.InTable(label)) return DoWithout(i, NotANumber());
    const Center weight = p_.sample_weight == nullptr ? Center{1} : p_.sample_weight[i];
    Center square = 0;
    for (int64_t column = 0;;) {
#pragma unroll
      for (int e = 0; e < kLane; ++e) {
        loaded.row[e] -= loaded.center[e];
        square += loaded.row[e] * loaded.row[e];
      }
      if (p_.residual != nullptr) StoreResidual(i, column, weight, loaded.row);
      column += kPass;
      if (column >= p_.dim) break;
      LoadRow<Width, Cache::kStreamed>(p_.Features(i), column, p_.dim, loaded.row);
      LoadCenter<Cache::kNormal>(label, column, loaded.center);
    }
    square = WarpSum(square);
    if (Lane() == 0) StoreLoss(i, weight * (square / 2), square);
    if (use == Sum::kUnused) return 0;
    const Members members = {1, i};
    const unsigned finite = FiniteMembers(members, square);
    if (finite == 0) return 0;
    if (p_.dim <= kPass) {
      UseSum(use, label, 1, 0, loaded.row, loaded.center, pool_row);
    } else {
      UseSumAgain(use, label, members, finite, pool_row);
    }
    return 1;
  }

  // A chunk: up to kWarp samples of one class. Returns how many of them are finite.
  __device__ int DoChunk(int64_t label, Members members, Sum use, int pool_row) {
    Center weight = 1;  // of the sample in this lane, and so is `squares`
    if (p_.sample_weight != nullptr && Lane() < members.count) {
      weight = p_.sample_weight[members.position];
    }
    Center squares = 0;
    const bool one_pass = p_.dim <= kPass;
    Share sum = {};
#pragma unroll 1
    for (int first = 0; first < members.count; first += kSide) {
      Center square[kSide] = {};
#pragma unroll 1
      for (int64_t column = 0; column < p_.dim; column += kPass) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          DoVectors(label, members, first, ColumnOf<Width>(column, v), weight, sum + v * Width,
                    square);
        }
      }
      WarpSums(square);
#pragma unroll
      for (int s = 0; s < kSide; ++s) {
        if (Lane() == first + s) squares = square[s];
      }
    }
    if (Lane() < members.count) StoreLoss(members.position, weight * (squares / 2), squares);
    const unsigned finite = FiniteMembers(members, squares);
    if (one_pass && __popc(finite) == members.count) {
      Share center;
      LoadCenter<Cache::kNormal>(label, 0, center);
      UseSum(use, label, members.count, 0, sum, center, pool_row);
    } else {
      UseSumAgain(use, label, members, finite, pool_row);
    }
    return __popc(finite);
  }

  // Hands on the sum of chunk number `chunk` of `chunks`, of `finite` samples, in its row of the
  // pool: up the reduction tree, as far as this warp is the last to arrive at a node. The warp that
  // gets to the root moves the center; by then all others have read it.
  __device__ void ReduceUpwards(int64_t label, int chunks, int chunk, int first_pool_row,
                                int finite) {
    const int fan_in = p_.tuning.fan_in;
    int level = 0;
#pragma unroll 1
    for (int width = 1; width < chunks; width *= fan_in, ++level) {
      const int own_row = first_pool_row + chunk / width * width;
      if (Lane() == 0) p_.finite_count[own_row] = finite;
      const int node = chunk / width / fan_in * fan_in * width;
      const int row = first_pool_row + node;
      const int children = min((chunks - node + width - 1) / width, fan_in);
      if (!LastWarpToArrive(p_.arrivals + level * p_.pool_rows + row, children)) return;
      finite = WarpSum(Lane() < children ? __ldcg(&p_.finite_count[row + Lane() * width]) : 0);
      const bool is_root = node == 0 && width * fan_in >= chunks;
      ReduceRows(row, children, width, is_root ? p_.CenterRow(label) : nullptr, finite);
    }
  }

  // One sample of a class of `count` whose sum is a row of the pool; the last one moves the center
  // and clears the row.
  __device__ void AddAtomically(int i, int64_t label, Loaded& loaded, int count, int row) {
    const int finite = DoAlone(i, label, loaded, Sum::kAddedAtomically, row);
    if (Lane() == 0 && finite > 0) atomicAdd(&p_.finite_count[row], finite);
    if (!LastWarpToArrive(p_.arrivals + row, count)) return;
    ReduceRows(row, 1, 1, p_.CenterRow(label), __ldcg(&p_.finite_count[row]));
    const Share zeros = {};
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      StoreRow<Width, Cache::kNormal>(p_.PoolRow(row), column, p_.dim, zeros);
    }
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

  // The center that is subtracted: none where the features are residuals.
  template <Cache cache>
  __device__ void LoadCenter(int64_t label, int64_t column, Share& center) const {
    const bool subtracts = !p_.features_are_residuals && p_.InTable(label);
    LoadRow<Width, cache>(subtracts ? p_.CenterRow(label) : nullptr, column,
                          subtracts ? p_.dim : 0, center);
  }

  __device__ void StoreResidual(int i, int64_t column, Center weight, const Share& row) const {
    const Center scale = weight * sample_scale_;
    Share scaled;
#pragma unroll
    for (int e = 0; e < kLane; ++e) scaled[e] = row[e] * scale;
    StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, scaled);
  }

  // This lane's vector at column `at` of kSide members, from `first` on: residuals, their squares
  // and their sum. Beyond the last member the last again, so that no load has a condition.
  __device__ void DoVectors(int64_t label, Members members, int first, int64_t at, Center weight,
                            Center* sum, Center (&square)[kSide]) const {
    const bool in_row = at < p_.dim;
    if (!__any_sync(kAllLanes, in_row)) return;
    const int64_t column = in_row ? at : 0;
    Center rows[kSide][Width], center[Width] = {};
    if (!p_.features_are_residuals) {
      LoadVector<Width, Cache::kNormal>(p_.CenterRow(label) + column, center);
    }
#pragma unroll
    for (int s = 0; s < kSide; ++s) {
      const int i = __shfl_sync(kAllLanes, members.position, min(first + s, members.count - 1));
      LoadVector<Width, Cache::kNormal>(p_.Features(i) + column, rows[s]);
    }
#pragma unroll
    for (int s = 0; s < kSide; ++s) {
      const bool adds = in_row && first + s < members.count;
#pragma unroll
      for (int e = 0; e < Width; ++e) {
        rows[s][e] -= center[e];
        if (adds) square[s] += rows[s][e] * rows[s][e];
        if (adds) sum[e] += rows[s][e];
      }
    }
    if (p_.residual == nullptr) return;
#pragma unroll
    for (int s = 0; s < kSide; ++s) {
      const int lane = min(first + s, members.count - 1);
      const int i = __shfl_sync(kAllLanes, members.position, lane);
      const Center scale = __shfl_sync(kAllLanes, weight, lane) * sample_scale_;
#pragma unroll
      for (int e = 0; e < Width; ++e) rows[s][e] *= scale;
      if (in_row && first + s < members.count) {
        StoreVector<Width, Cache::kStreamed>(p_.residual + i * p_.dim + at, rows[s]);
      }
    }
  }

  // The lanes whose member has finite features, as bits. `squares`: of this lane's member, or of
  // all lanes'. Where that is finite so are the features, so only the rest is looked at again.
  __device__ unsigned FiniteMembers(Members members, Center squares) const {
    const unsigned all = members.count == kWarp ? kAllLanes : (1u << members.count) - 1;
    unsigned finite = all & __ballot_sync(kAllLanes, IsFinite(squares));
    for (unsigned left = all & ~finite; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const int i = __shfl_sync(kAllLanes, members.position, lane);
      bool row_is_finite = true;
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        Share row;
        LoadRow<Width, Cache::kNormal>(p_.Features(i), column, p_.dim, row);
#pragma unroll
        for (int e = 0; e < kLane; ++e) row_is_finite = row_is_finite && IsFinite(row[e]);
      }
      if (__all_sync(kAllLanes, row_is_finite)) finite |= 1u << lane;
    }
    return finite;
  }

  // Adds up the residuals of the finite members anew: of rows that are longer than a pass, or that
  // are not all finite.
  __device__ void UseSumAgain(Sum use, int64_t label, Members members, unsigned finite,
                              int pool_row) {
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Share center, row, sum = {};
      LoadCenter<Cache::kNormal>(label, column, center);
#pragma unroll 1
      for (unsigned left = finite; left != 0; left &= left - 1) {
        const int lane = __ffs(static_cast<int>(left)) - 1;
        const int i = __shfl_sync(kAllLanes, members.position, lane);
        LoadRow<Width, Cache::kNormal>(p_.Features(i), column, p_.dim, row);
#pragma unroll
        for (int e = 0; e < kLane; ++e) sum[e] += row[e] - center[e];
      }
      UseSum(use, label, __popc(finite), column, sum, center, pool_row);
    }
  }

  // A pass of a sum of `finite` residuals, and the center that was subtracted there.
  __device__ void UseSum(Sum use, int64_t label, int finite, int64_t column, const Share& sum,
                         Share& center, int pool_row) {
    if (use == Sum::kStored) {
      StoreRow<Width, Cache::kNormal>(p_.PoolRow(pool_row), column, p_.dim, sum);
    } else if (use == Sum::kAddedAtomically) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = ColumnOf<Width>(column, v);
        if (at < p_.dim) AddVector<Width>(p_.PoolRow(pool_row) + at, sum + v * Width);
      }
    } else if (finite > 0) {
      const Center scale = StepScale(p_.options.rule, Alpha(), finite, counted_);
      if (p_.features_are_residuals) {
        LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      }
#pragma unroll
      for (int e = 0; e < kLane; ++e) center[e] += scale * sum[e];
      StoreRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
    }
  }

  // Adds up `count` rows of the pool, `step` apart, into the first of them; or, at the root, moves
  // the center by their sum, of `finite` residuals.
  __device__ void ReduceRows(int row, int count, int step, Center* center_row, int finite) {
    const bool is_root = center_row != nullptr;
    if (is_root && finite == 0) return;
    const Center scale = is_root ? StepScale(p_.options.rule, Alpha(), finite, counted_) : Center{1};
    Center* const into = is_root ? center_row : p_.PoolRow(row);
#pragma unroll 1
    for (int64_t at = ColumnOf<Width>(0, 0); at < p_.dim; at += kStride) {
      Center sum[Width] = {}, center[Width] = {};
      if (is_root) LoadVector<Width, Cache::kNormal>(center_row + at, center);
#pragma unroll 1
      for (int k = 0; k < count; k += kSumLoads) {
        Center rows[kSumLoads][Width];
#pragma unroll
        for (int s = 0; s < kSumLoads; ++s) {  // without a condition, see DoVectors
          const Center* const from = p_.PoolRow(row + min(k + s, count - 1) * step);
          LoadVector<Width, Cache::kShared>(from + at, rows[s]);
        }
#pragma unroll
        for (int s = 0; s < kSumLoads; ++s) {
#pragma unroll
          for (int e = 0; e < Width; ++e) sum[e] += k + s < count ? rows[s][e] : Center{0};
        }
      }
#pragma unroll
      for (int e = 0; e < Width; ++e) center[e] += scale * sum[e];
      StoreVector<Width, Cache::kNormal>(into + at, center);
    }
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
  Center sample_scale_ = 0;
  int counted_ = 0;
  bool moves_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_
