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
  using Piece = Center[kLane];  // this lane's share of kPass columns

  __device__ explicit Rows(const Parameters<Feature>& p) : p_(p) {
    alpha_ = p.cuda.alpha == nullptr ? p.options.alpha : *p.cuda.alpha;
    moves_ = p.options.update_centers && IsFinite(alpha_) && alpha_ > 0;
  }

  // Whether any center moves; with alpha = 0 none does, so none is touched.
  __device__ bool moves() const { return moves_; }

  __device__ void SetCounted(int counted) {
    counted_ = counted;
    sample_scale_ = ReductionScale(p_.options.reduction, Weight(), counted);
  }

  // Fetches what sample i needs, ahead of the look-up of its class.
  __device__ void Prefetch(int i) {
    if (i >= p_.batch) return;
    PrefetchRow(p_.Features(i), p_.dim);
    const int64_t label = p_.Label(i);
    if (p_.InTable(label)) PrefetchRow(p_.CenterRow(label), p_.dim);
  }

  // An ignored sample, or one whose label is no row of the table.
  __device__ void Without(int i, Center value) {
    if (p_.residual != nullptr) {
      Piece row;
#pragma unroll
      for (int e = 0; e < kLane; ++e) row[e] = value;
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, row);
      }
    }
    if (Lane() == 0) StoreLoss(i, value, value);
  }

  // The only sample of its class, or one of many where no center moves.
  __device__ void Alone(int i, int64_t label) {
    Chunk(label, {1, i}, moves_ ? Sums::kMove : Sums::kNone, nullptr);
  }

  // The chunk that sample i leads, i being the sample of index.SetClass().
  template <typename Index>
  __device__ void Lead(int i, int64_t label, Index& index) {
    const int left = index.count() - index.rank();
    const Members members = index.Find(index.rank(), 1, min(left, kMembers));
    if (index.count() <= kMembers) {
      Chunk(label, members, Sums::kMove, nullptr);
      return;
    }
    int row = 0;
    if (Lane() == 0) row = atomicAdd(&p_.header->pool_rows, 1);
    row = __shfl_sync(kAllLanes, row, 0);
    const int count = Chunk(label, members, Sums::kStore, p_.PoolAt(row));
    if (Lane() == 0) p_.sums_by_leader[i] = PoolRow{row, count};
    Climb(label, index);
  }

  // One sample of a class of several, without an order: adds its residual to the row of the class.
  __device__ void AddAtomically(int i, int64_t label, int group, int members) {
    const int row = __ldcg(&p_.sums_by_leader[group].row);
    Center* const sum = p_.PoolAt(row);
    const int count = Chunk(label, {1, i}, Sums::kAdd, sum);
    if (Lane() == 0 && count > 0) atomicAdd(&p_.sums_by_leader[group].count, count);
    if (!LastToArrive(&p_.arrivals[group], members)) return;
    const int finite = __ldcg(&p_.sums_by_leader[group].count);
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Piece total, zeros;
      LoadRow<Width, Cache::kShared>(sum, column, p_.dim, total);
      MoveCenter(label, column, finite, total);
#pragma unroll
      for (int e = 0; e < kLane; ++e) zeros[e] = 0;
      StoreRow<Width, Cache::kNormal>(sum, column, p_.dim, zeros);
    }
  }

  // The sum of the losses in batch order, by one block; shared: [threads] doubles.
  __device__ void ReduceLoss(double* shared) {
    const int threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x);
    double sum = 0;
    for (int i = thread; i < p_.batch; i += threads) sum += __ldcg(&p_.sample_loss[i]);
    shared[thread] = sum;
    for (int half = threads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) shared[thread] += shared[thread + half];
    }
    if (thread != 0) return;
    sum = shared[0] * static_cast<double>(Weight());
    if (p_.options.reduction == Reduction::kMean) {
      sum = counted_ == 0 ? 0 : sum / static_cast<double>(counted_);
    }
    *p_.loss = static_cast<Center>(sum);
  }

  __device__ bool reduces_loss() const {
    return p_.loss != nullptr && p_.options.reduction != Reduction::kNone;
  }

  __device__ static Center NotANumber() { return static_cast<Center>(FloatOf(0x7fc00000u)); }

 private:
  // Read again at the end of the launch: there is no register to keep it in meanwhile.
  __device__ Center Weight() const {
    // No kernel can raise: a bad alpha shows in the loss.
    if (p_.options.update_centers && !(IsFinite(alpha_) && alpha_ >= 0)) return NotANumber();
    return p_.cuda.weight == nullptr ? p_.options.weight : *p_.cuda.weight;
  }

  // What becomes of the sum of a chunk's residuals.
  enum class Sums { kNone, kMove, kStore, kAdd };

  // Does the members, which lie in the lanes. Returns how many of them are finite.
  __device__ int Chunk(int64_t label, Members members, Sums sums, Center* sum_row) {
    const bool holds = Lane() < members.count;
    Center sample_weight = 1;
    if (p_.sample_weight != nullptr && holds) sample_weight = p_.sample_weight[members.position];
    Center squares = 0;  // ||d||^2 of this lane's member
    // A row longer than kPass has to be gone through before any of it may be added up.
    const bool whole_rows = p_.dim <= kPass;
    unsigned finite = kAllLanes;
    if (!whole_rows && sums != Sums::kNone) finite = FiniteMembers(members);

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
        if (whole_rows && !__all_sync(kAllLanes, AllFinite(row))) finite &= ~(1u << m);
        const bool adds = finite >> m & 1;
        Center square = 0;
#pragma unroll
        for (int e = 0; e < kLane; ++e) {
          row[e] -= center[e];
          square += row[e] * row[e];
          sum[e] += adds ? row[e] : Center{0};
        }
        square = WarpSum(square);
        if (Lane() == m) squares += square;
        if (p_.residual != nullptr) {
          const Center scale = __shfl_sync(kAllLanes, sample_weight, m) * sample_scale_;
          const int i = __shfl_sync(kAllLanes, members.position, m);
#pragma unroll
          for (int e = 0; e < kLane; ++e) row[e] *= scale;
          StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, row);
        }
#pragma unroll
        for (int e = 0; e < kLane; ++e) row[e] = next[e];
      }
      const int count = FiniteCount(finite, members);
      if (sums == Sums::kMove) MoveCenter(label, column, count, sum, center);
      if (sums == Sums::kStore) StoreRow<Width, Cache::kNormal>(sum_row, column, p_.dim, sum);
      if (sums == Sums::kAdd && count > 0) AddRow(sum_row, column, sum);
    }
    if (holds) StoreLoss(members.position, sample_weight * (squares / 2), squares);
    return FiniteCount(finite, members);
  }

  __device__ void LoadMember(Members members, int m, int64_t column, Piece& row) {
    const int i = __shfl_sync(kAllLanes, members.position, m);
    LoadRow<Width, Cache::kStreamed>(p_.Features(i), column, p_.dim, row);
  }

  __device__ static bool AllFinite(const Piece& row) {
    bool finite = true;
#pragma unroll
    for (int e = 0; e < kLane; ++e) finite = finite && IsFinite(row[e]);
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
        row_is_finite = row_is_finite && AllFinite(row);
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
    if (p_.features_are_residuals) {
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
    }
    const Center scale = StepScale(p_.options.rule, alpha_, count, counted_);
#pragma unroll
    for (int e = 0; e < kLane; ++e) center[e] += scale * sum[e];
    StoreRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
  }

  __device__ void MoveCenter(int64_t label, int64_t column, int count, const Piece& sum) {
    Piece center;
    LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
    MoveCenter(label, column, count, sum, center);
  }

  __device__ void AddRow(Center* row, int64_t column, const Piece& in) {
#pragma unroll
    for (int v = 0; v < kLane / Width; ++v) {
      const int64_t at = ColumnOf<Width>(column, v);
      if (at >= p_.dim) continue;
      AddVector<Width>(row + at, in + v * Width);
    }
  }

  // Whether this warp is the last of so many at the counter, which is then zero again. What the
  // others wrote before they came is visible to it.
  __device__ bool LastToArrive(int* counter, int arrivals) {
    __syncwarp();  // what the other lanes wrote comes before the fence of the first
    bool last = false;
    if (Lane() == 0) {
      __threadfence();
      last = atomicAdd(counter, 1) == arrivals - 1;
      if (last) *counter = 0;
      __threadfence();
    }
    __syncwarp();  // and what they will read comes after it: a shuffle orders no memory
    return __any_sync(kAllLanes, last);
  }

  // Up the tree from the chunk of index.rank(), as far as this warp is the last to arrive. A node
  // is known by its first chunk, and that by the position of its leader.
  template <typename Index>
  __device__ void Climb(int64_t label, Index& index) {
    const int chunks = (index.count() + kMembers - 1) / kMembers;
    int chunk = index.rank() / kMembers;
    int* arrivals = p_.arrivals;
    for (int64_t width = 1;; width *= kMembers, arrivals += p_.batch) {
      const int64_t node_width = width * kMembers;
      const int first = static_cast<int>(chunk / node_width * node_width);
      const int children =
          static_cast<int>(min((chunks - first + width - 1) / width, int64_t{kMembers}));
      const bool root = node_width >= chunks;
      const Members leaders =
          index.Find(first * kMembers, static_cast<int>(width) * kMembers, children);
      const int name = __shfl_sync(kAllLanes, leaders.position, 0);
      if (!LastToArrive(&arrivals[name], children)) return;

      PoolRow child = {0, 0};
      if (Lane() < children) {
        child.row = __ldcg(&p_.sums_by_leader[leaders.position].row);
        child.count = __ldcg(&p_.sums_by_leader[leaders.position].count);
      }
      const int count = WarpSum(child.count);
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        Piece sum, next;
#pragma unroll
        for (int e = 0; e < kLane; ++e) sum[e] = 0;
        for (int k = 0; k < children; ++k) {
          const int row = __shfl_sync(kAllLanes, child.row, k);
          LoadRow<Width, Cache::kShared>(p_.PoolAt(row), column, p_.dim, next);
#pragma unroll
          for (int e = 0; e < kLane; ++e) sum[e] += next[e];
        }
        if (root) {
          MoveCenter(label, column, count, sum);
        } else {
          StoreRow<Width, Cache::kNormal>(p_.PoolAt(__shfl_sync(kAllLanes, child.row, 0)), column,
                                          p_.dim, sum);
        }
      }
      if (root) return;
      if (Lane() == 0) p_.sums_by_leader[name].count = count;
      chunk = first;
    }
  }

  __device__ void StoreLoss(int i, Center loss, Center squares) {
    if (reduces_loss()) {
      p_.sample_loss[i] = loss;
    } else if (p_.loss != nullptr) {
      p_.loss[i] = loss * sample_scale_;
    }
    if (p_.squared_distance != nullptr) p_.squared_distance[i] = squares;
  }

  const Parameters<Feature>& p_;
  Center alpha_;
  Center sample_scale_ = 0;
  int counted_ = 0;
  bool moves_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_ROWS_CUH_
