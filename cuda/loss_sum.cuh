// How the losses of the samples become one number: in boxes, which the warps that do the samples
// fill and others wait at. No fence has to wait until the rows are written.
//
// A scanned launch: the last block adds up all of them. A hashed one, whose blocks are all
// resident: block after block adds up units of kLossUnit samples, and the last block adds up the
// units. The order does not depend on the number of blocks.

#ifndef TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_
#define TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// The one that waits for others in a scanned launch. It does so when it has done its own samples,
// and a multiprocessor has room for two blocks: those that have not begun yet do not depend on it.
__device__ __forceinline__ bool IsLastBlock() { return blockIdx.x == gridDim.x - 1; }

inline int64_t LossSumSharedBytes(int threads) {
  return threads / kWarp * static_cast<int64_t>(sizeof(double));
}

// The sum of what lies in the boxes, once they are full; then they are empty. By all threads of a
// block; the sum is at the first.
template <typename T>
__device__ double SumOfBoxes(Box<T>* boxes, int count, unsigned char* shared) {
  constexpr int kLoads = 8;  // in flight
  const int threads = static_cast<int>(blockDim.x);
  double sum = 0;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kLoads * threads) {
    T numbers[kLoads];
    for (;;) {
      bool there = true;
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {  // beyond the end the first again, see Rows::LoadMembers
        const int i = first + k * threads;
        there &= LookInto(&boxes[i < count ? i : first], &numbers[k]);
      }
      if (there) break;
      __nanosleep(20);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = first + k * threads;
      if (i >= count) break;
      sum += numbers[k];
      Empty(&boxes[i]);
    }
  }
  sum = WarpSum(sum);
  double* const of_warps = reinterpret_cast<double*>(shared);
  __syncthreads();  // nobody needs what was there
  if (Lane() == 0) of_warps[WarpOfBlock()] = sum;
  __syncthreads();
  for (int warp = 1; warp < threads / kWarp && threadIdx.x == 0; ++warp) sum += of_warps[warp];
  return sum;
}

// The sum of all samples' losses, at the first thread of the last block.
template <typename Feature>
__device__ double SumOfUnits(const Parameters<Feature>& p, unsigned char* shared) {
  const int units = (p.batch + kLossUnit - 1) / kLossUnit;
  for (int unit = static_cast<int>(blockIdx.x); unit < units; unit += static_cast<int>(gridDim.x)) {
    const int first = unit * kLossUnit;
    const double sum = SumOfBoxes(p.sample_loss + first, min(kLossUnit, p.batch - first), shared);
    if (threadIdx.x == 0) Fill(&p.unit_loss[unit], sum);
  }
  return IsLastBlock() ? SumOfBoxes(p.unit_loss, units, shared) : 0;
}

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_
