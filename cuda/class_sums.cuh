// The sum of the residuals of a large class (three samples or more), and the move of its center.
//
// The samples of a class, in batch order, are cut into chunks of kChunk samples, and the row into
// column slices of one vector for each lane. One warp adds up one slice of one chunk, after all
// samples of the class (of the chunk, in the scan kernel) have read the center.
//
// If the class has one chunk, the warp then moves its slice of the center. Otherwise it stores a
// partial sum and arrives at a node of the reduction tree. The last warp to arrive at a node adds
// up the node's children, at most kChunk, into the row of the first child; the warp that reaches
// the root moves its slice of the center. The labels alone determine the shape of the tree, so the
// result does not depend, bit for bit, on which warp is the last to arrive.

#ifndef TF_CENTER_LOSS_OP_CUDA_CLASS_SUMS_CUH_
#define TF_CENTER_LOSS_OP_CUDA_CLASS_SUMS_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/warp_step.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// The number of column slices.
template <typename Feature, int Width>
__device__ int Slices(int64_t dim) {
  return static_cast<int>((dim + kWarp * Width - 1) / (kWarp * Width));
}

// A chunk of a large class, without its members. The default is no chunk.
struct Chunk {
  int64_t label = 0;
  int chunks = 0;             // number of chunks of the class; 0: there is no chunk
  int chunk = 0;              // index among them
  int count = 0;              // samples of this chunk
  int first_partial_sum = 0;  // row of the class's first partial sum, for a multi-chunk class
  bool all_finite = false;    // all features are finite; false: unknown, so every row is checked
};

// kLoads rows are loaded before the first of them is used, to hide the latency of memory.
template <typename Feature, int Width, int kLoads>
class ClassSums {
 public:
  using Center = CenterType<Feature>;
  using Vector = Center[Width];

  __device__ ClassSums(const Parameters<Feature>& p, const WarpStep<Feature, Width>& step)
      : p_(p), step_(step) {}

  // Adds up one column slice of a chunk, and moves that slice of the center if the sum of the class
  // is then complete. `members` are the positions of the chunk's samples, in batch order.
  __device__ void ProcessSlice(const Chunk& chunk, const int* members, int slice) {
    const int64_t at = ColumnOf<Width>(int64_t{slice} * kWarp * Width, 0);
    const bool in_row = at < p_.dim;
    // Bit m: member m has finite features.
    unsigned finite = chunk.count == kChunk ? kAllLanes : (1u << chunk.count) - 1;
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
    // A lane beyond the end of the row climbs the tree too, at column D, where it stores nothing.
    if (chunk.chunks > 1 && !ReachRoot(chunk, slice, in_row ? at : p_.dim, sum, &finite_count)) {
      return;
    }
    if (finite_count == 0 || !in_row) return;
    const Center scale = step_.Scale(finite_count);
#pragma unroll
    for (int e = 0; e < Width; ++e) center[e] += scale * sum[e];
    StoreVector<Width, Cache::kNormal>(p_.CenterRow(chunk.label) + at, center);
  }

 private:
  // Adds up the residuals of the members with finite features at column `at`, in batch order.
  __device__ void AddMembers(const int* members, int count, unsigned finite, int64_t at,
                             const Vector& center, Vector& sum) const {
#pragma unroll 1
    for (int first = 0; first < count; first += kLoads) {
      Vector rows[kLoads];
#pragma unroll
      for (int m = 0; m < kLoads; ++m) {
        // Past the end, load the last member again: a branch would delay the loads.
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

  // Climbs the reduction tree while this warp is the last to arrive at a node. Returns whether it
  // reached the root; `sum` and `finite` are then those of the whole class. The sum of a node is in
  // the row of its first chunk. Its counter is arrivals[level, that row, slice].
  __device__ bool ReachRoot(const Chunk& leaf, int slice, int64_t at, Vector& sum,
                            int* finite) const {
    const int first_row = leaf.first_partial_sum, chunks = leaf.chunks, chunk = leaf.chunk;
    const int slices = Slices<Feature, Width>(p_.dim);
    int level = 0;
    // `covered` is the number of chunks below each child of the node.
#pragma unroll 1
    for (int covered = 1; covered < chunks; covered *= kChunk, ++level) {
      const int child = chunk / covered * covered;
      Center* const partial_sum = p_.PartialSum(first_row + child);
      if (at < p_.dim) StoreVector<Width, Cache::kNormal>(partial_sum + at, sum);
      const int parent = chunk / covered / kChunk * kChunk * covered;
      const int row = first_row + parent;
      const int children = min((chunks - parent + covered - 1) / covered, kChunk);
      Arrivals* const counter = p_.arrivals + (level * p_.partial_sum_rows + row) * slices + slice;
      if (!LastWarpToArrive(counter, children, finite)) return false;
#pragma unroll
      for (int e = 0; e < Width; ++e) sum[e] = 0;
#pragma unroll 1
      for (int first = 0; first < children; first += kLoads) {
        Vector rows[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          const Center* const from = p_.PartialSum(row + min(first + k, children - 1) * covered);
          LoadVector<Width, Cache::kL2>(from + (at < p_.dim ? at : 0), rows[k]);
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
