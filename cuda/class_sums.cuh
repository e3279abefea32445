// The sum of the residuals of a class of three samples or more, and the move of its center.
//
// The work is cut into chunks of up to kChunk samples of consecutive ranks, and into slices of
// columns, one vector for each lane: a warp each. Every sample's own warp has read the center before.
// A class of one chunk is then done. Several chunks leave partial sums in rows of the pool, slice by
// slice, and meet in a reduction tree: the last warp to arrive at a node adds up the up to kChunk
// sums below it, in the row of the first one; the warp at the root moves its slice of the center.

#ifndef TF_CENTER_LOSS_OP_CUDA_CLASS_SUMS_CUH_
#define TF_CENTER_LOSS_OP_CUDA_CLASS_SUMS_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/warp_step.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// Slices of a row.
template <typename Feature, int Width>
__device__ int Slices(int64_t dim) {
  return static_cast<int>((dim + kWarp * Width - 1) / (kWarp * Width));
}

template <typename Feature, int Width>
class ClassSums {
 public:
  using Center = CenterType<Feature>;
  using Vector = Center[Width];

  // `members`: kChunk positions in shared memory, this warp's.
  __device__ ClassSums(const Parameters<Feature>& p, const WarpStep<Feature, Width>& step,
                       int* members)
      : p_(p), step_(step), members_(members) {}

  // Does one slice of one chunk of the class that `labels` is set to.
  template <typename Labels>
  __device__ void DoSlice(Labels& labels, int chunk, int slice) {
    const int chunks = (labels.count() + kChunk - 1) / kChunk;
    const int count = min(labels.count() - chunk * kChunk, kChunk);
    const int64_t label = labels.label();
    const int64_t at = ColumnOf<Width>(int64_t{slice} * kWarp * Width, 0);
    const bool in_row = at < p_.dim;
    __syncwarp();  // the members of the slice before have been read
    labels.Find(chunk * kChunk, count, members_);
    __syncwarp();
    Vector center = {}, sum = {};
    if (in_row) LoadVector<Width, Cache::kNormal>(p_.CenterRow(label) + at, center);
    AddMembers(count, in_row ? at : 0, center, sum);
    if (chunks > 1) {
      const int row = labels.FirstPoolRow();
      if (!ReduceUpwards(row, chunks, chunk, slice, in_row ? at : p_.dim, sum)) return;
    }
    const int finite = labels.FiniteCount();
    if (finite == 0 || !in_row) return;
    const Center scale = step_.Scale(finite);
#pragma unroll
    for (int e = 0; e < Width; ++e) center[e] += scale * sum[e];
    StoreVector<Width, Cache::kNormal>(p_.CenterRow(label) + at, center);
  }

 private:
  static constexpr int kLoads = sizeof(Center) == 8 ? 8 : 16;  // rows in flight

  // Adds up the residuals of the finite members at column `at`.
  __device__ void AddMembers(int count, int64_t at, const Vector& center, Vector& sum) const {
    const int own = members_[min(Lane(), count - 1)];
    const unsigned finite = __ballot_sync(kAllLanes, __ldcg(&p_.finite[own]) != 0);
    const Center subtracted = p_.features_are_residuals ? 0 : 1;
#pragma unroll 1
    for (int first = 0; first < count; first += kLoads) {
      Vector rows[kLoads];
#pragma unroll
      for (int m = 0; m < kLoads; ++m) {
        // Beyond the last member the last again, so that no load has a condition.
        const int i = members_[min(first + m, count - 1)];
        LoadVector<Width, Cache::kNormal>(p_.Features(i) + at, rows[m]);
      }
#pragma unroll
      for (int m = 0; m < kLoads; ++m) {
        const bool adds = first + m < count && (finite >> (first + m) & 1) != 0;
#pragma unroll
        for (int e = 0; e < Width; ++e) {
          sum[e] += adds ? rows[m][e] - subtracted * center[e] : Center{0};
        }
      }
    }
  }

  // Returns whether this warp gets to the root; then `sum` is that of the whole class.
  __device__ bool ReduceUpwards(int first_row, int chunks, int chunk, int slice, int64_t at,
                                Vector& sum) const {
    const int slices = Slices<Feature, Width>(p_.dim);
    int level = 0;
#pragma unroll 1
    for (int width = 1; width < chunks; width *= kChunk, ++level) {  // chunks below a child
      const int child = chunk / width * width;
      if (at < p_.dim) StoreVector<Width, Cache::kNormal>(p_.PoolRow(first_row + child) + at, sum);
      const int parent = chunk / width / kChunk * kChunk * width;
      const int row = first_row + parent;
      const int children = min((chunks - parent + width - 1) / width, kChunk);
      int* const counter = p_.arrivals + (level * p_.pool_rows + row) * slices + slice;
      if (!LastWarpToArrive(counter, children)) return false;
#pragma unroll
      for (int e = 0; e < Width; ++e) sum[e] = 0;
#pragma unroll 1
      for (int first = 0; first < children; first += kLoads) {
        Vector rows[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          const Center* const from = p_.PoolRow(row + min(first + k, children - 1) * width);
          LoadVector<Width, Cache::kShared>(from + (at < p_.dim ? at : 0), rows[k]);
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
#pragma unroll
          for (int e = 0; e < Width; ++e) sum[e] += first + k < children ? rows[k][e] : Center{0};
        }
      }
    }
    return true;
  }

  const Parameters<Feature>& p_;
  const WarpStep<Feature, Width>& step_;
  int* members_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_CLASS_SUMS_CUH_
