// The sum of the residuals of a class of three samples or more, and the move of its center.
//
// The work is cut into chunks of up to kChunk samples of consecutive ranks, and into slices of
// columns, one vector for each lane: a warp each. By then all warps with samples of the class have
// read the center. A class of one chunk is then done. Several chunks leave partial sums in rows of
// the pool, slice by slice, and meet in a reduction tree. The last warp to arrive at a node adds up
// its children's sums, kChunk at most, in the row of the first one; the warp at the root moves its
// slice of the center.

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

// A chunk of a class, as the labels' forms find it.
struct Chunk {
  int64_t label = 0;
  int chunks = 0;           // of the class; 0: no chunk
  int chunk = 0;            // which of them
  int count = 0;            // samples in it
  int first_pool_row = 0;   // of the class, where it has several chunks
  bool all_finite = false;  // so are the features of all its samples
};

// kLoads: rows that are in flight together.
template <typename Feature, int Width, int kLoads>
class ClassSums {
 public:
  using Center = CenterType<Feature>;
  using Vector = Center[Width];

  __device__ ClassSums(const Parameters<Feature>& p, const WarpStep<Feature, Width>& step)
      : p_(p), step_(step) {}

  // Does one slice of a chunk, whose samples' positions in the batch are in shared memory.
  __device__ void DoSlice(const Chunk& chunk, const int* members, int slice) {
    const int64_t at = ColumnOf<Width>(int64_t{slice} * kWarp * Width, 0);
    const bool in_row = at < p_.dim;
    unsigned finite = chunk.count == kWarp ? kAllLanes : (1u << chunk.count) - 1;
    if (!chunk.all_finite) {
#pragma unroll 1
      for (int m = 0; m < chunk.count; ++m) {
        if (!step_.RowIsFinite(members[m])) finite &= ~(1u << m);
      }
    }
    Vector center = {}, sum = {};
    if (in_row) LoadVector<Width, Cache::kNormal>(p_.CenterRow(chunk.label) + at, center);
    AddMembers(members, chunk.count, finite, in_row ? at : 0, center, sum);
    int finite_count = __popc(finite);
    if (chunk.chunks > 1 &&
        !ReduceUpwards(chunk, slice, in_row ? at : p_.dim, sum, &finite_count)) {
      return;
    }
    if (finite_count == 0 || !in_row) return;
    const Center scale = step_.Scale(finite_count);
#pragma unroll
    for (int e = 0; e < Width; ++e) center[e] += scale * sum[e];
    StoreVector<Width, Cache::kNormal>(p_.CenterRow(chunk.label) + at, center);
  }

 private:
  // Adds up the residuals of the finite members at column `at`.
  __device__ void AddMembers(const int* members, int count, unsigned finite, int64_t at,
                             const Vector& center, Vector& sum) const {
#pragma unroll 1
    for (int first = 0; first < count; first += kLoads) {
      Vector rows[kLoads];
#pragma unroll
      for (int m = 0; m < kLoads; ++m) {
        // Beyond the last member the last again, so that no load has a condition.
        const int i = members[min(first + m, count - 1)];
        LoadVector<Width, Cache::kNormal>(p_.Features(i) + at, rows[m]);
      }
#pragma unroll
      for (int m = 0; m < kLoads; ++m) {
        const bool adds = first + m < count && (finite >> (first + m) & 1) != 0;
#pragma unroll
        for (int e = 0; e < Width; ++e) {
          const Center residual = p_.features_are_residuals ? rows[m][e] : rows[m][e] - center[e];
          sum[e] += adds ? residual : Center{0};
        }
      }
    }
  }

  // Returns whether this warp gets to the root; then `sum` and `finite` are of the whole class.
  __device__ bool ReduceUpwards(const Chunk& leaf, int slice, int64_t at, Vector& sum,
                                int* finite) const {
    const int first_row = leaf.first_pool_row, chunks = leaf.chunks, chunk = leaf.chunk;
    const int slices = Slices<Feature, Width>(p_.dim);
    int level = 0;
#pragma unroll 1
    for (int width = 1; width < chunks; width *= kChunk, ++level) {  // chunks below a child
      const int child = chunk / width * width;
      if (at < p_.dim) StoreVector<Width, Cache::kNormal>(p_.PoolRow(first_row + child) + at, sum);
      const int parent = chunk / width / kChunk * kChunk * width;
      const int row = first_row + parent;
      const int children = min((chunks - parent + width - 1) / width, kChunk);
      Arrivals* const counter = p_.arrivals + (level * p_.pool_rows + row) * slices + slice;
      if (!LastWarpToArrive(counter, children, finite)) return false;
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
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_CLASS_SUMS_CUH_
