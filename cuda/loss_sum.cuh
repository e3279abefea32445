// The sum of the samples' losses. The warp that does a sample publishes its loss in a mailbox, so
// no fence has to wait until rows are written. A block that has done its own samples polls them.
//
// A scanned launch: the last block adds up all of them. A hashed one, whose blocks are all
// resident: one block after the other adds up a unit of kLossUnit samples, and the last block adds
// up the units. The order of the sum does not depend on the number of blocks.

#ifndef TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_
#define TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// In a scanned launch the last block waits for blocks that began before it. Those that begin later
// do not depend on it.
__device__ __forceinline__ bool IsLastBlock() { return blockIdx.x == gridDim.x - 1; }

// The sum of the numbers in `count` mailboxes, which are then empty again. By all threads of a
// block, with a double for each warp in `shared`; the first thread has the sum.
template <typename T>
__device__ double SumOfMailboxes(Mailbox<T>* mailboxes, int count, int wait_ns,
                                 unsigned char* shared) {
  constexpr int kLoads = 8;  // in flight
  const int threads = static_cast<int>(blockDim.x);
  double sum = 0;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kLoads * threads) {
    T numbers[kLoads];
    for (;;) {
      bool all = true;
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int i = first + k * threads;
        if (i < count) all &= Poll(&mailboxes[i], &numbers[k]);
      }
      if (all) break;
      Sleep(wait_ns);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = first + k * threads;
      if (i >= count) break;
      sum += numbers[k];
      Empty(&mailboxes[i]);
    }
  }
  sum = WarpSum(sum);
  double* const of_warps = reinterpret_cast<double*>(shared);
  __syncthreads();  // shared memory is free
  if (Lane() == 0) of_warps[WarpOfBlock()] = sum;
  __syncthreads();
  for (int warp = 1; warp < threads / kWarp && threadIdx.x == 0; ++warp) sum += of_warps[warp];
  return sum;
}

// The sum of all losses of a hashed launch, at the first thread of the last block.
template <typename Feature>
__device__ double SumOfUnits(const Parameters<Feature>& p, unsigned char* shared) {
  const int units = (p.batch + kLossUnit - 1) / kLossUnit;
  const int wait_ns = p.tuning.wait_ns;
  for (int unit = static_cast<int>(blockIdx.x); unit < units && units > 1;
       unit += static_cast<int>(gridDim.x)) {
    const int first = unit * kLossUnit;
    const int count = min(kLossUnit, p.batch - first);
    const double sum = SumOfMailboxes(p.sample_loss + first, count, wait_ns, shared);
    if (threadIdx.x == 0) Publish(&p.unit_loss[unit], sum);
  }
  if (!IsLastBlock()) return 0;
  if (units == 1) return SumOfMailboxes(p.sample_loss, p.batch, wait_ns, shared);
  return SumOfMailboxes(p.unit_loss, units, wait_ns, shared);
}

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_
