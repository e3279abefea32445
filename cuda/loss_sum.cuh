// The sum of the losses of all samples. The warp that processes a sample publishes its loss in a
// mailbox, and a block that has finished its own samples polls the mailboxes. A mailbox needs no
// fence. So a warp need not wait for the stores of its scaled residuals to complete before it
// publishes.
//
// In the scan kernel, and in the hash kernel for at most kLossSegment samples, the block with the
// highest index adds up all losses. For more samples, the blocks of the hash kernel take the loss
// segments of kLossSegment samples in turn, and the block with the highest index adds up the sums
// of the segments. The order of the additions depends on the kernel, the batch size and the block
// size, not on the number of blocks.

#ifndef TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_
#define TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// Whether this is the block with the highest index, which waits for the losses of the other blocks.
// In the scan kernel not all blocks need be resident together. The wait ends all the same, because
// the other blocks wait for none: they run one after another while this block stays resident.
__device__ __forceinline__ bool IsHighestBlock() { return blockIdx.x == gridDim.x - 1; }

// Adds up the numbers in `count` mailboxes and empties them. All threads of the block call it, and
// `shared` must have room for one double for each warp; thread 0 gets the sum. (cub::BlockReduce
// needs the block size at compile time, and does not specify the order of its additions.)
template <typename T>
__device__ double SumOfMailboxes(Mailbox<T>* mailboxes, int count, int wait_ns,
                                 unsigned char* shared) {
  constexpr int kLoads = 8;  // of a thread, in flight together
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
  double* const warp_sums = reinterpret_cast<double*>(shared);
  __syncthreads();  // all threads have finished with the earlier contents of `shared`
  if (Lane() == 0) warp_sums[WarpOfBlock()] = sum;
  __syncthreads();
  // Thread 0 only.
  for (int warp = 1; warp < threads / kWarp && threadIdx.x == 0; ++warp) sum += warp_sums[warp];
  return sum;
}

// The sum of all losses in the hash kernel; thread 0 of the block with the highest index gets it.
template <typename Feature>
__device__ double SumOfLosses(const Parameters<Feature>& p, unsigned char* shared) {
  const int segments = (p.batch + kLossSegment - 1) / kLossSegment;
  const int wait_ns = p.tuning.wait_ns;
  for (int segment = static_cast<int>(blockIdx.x); segment < segments && segments > 1;
       segment += static_cast<int>(gridDim.x)) {
    const int first = segment * kLossSegment;
    const int count = min(kLossSegment, p.batch - first);
    const double sum = SumOfMailboxes(p.sample_loss + first, count, wait_ns, shared);
    if (threadIdx.x == 0) Publish(&p.segment_loss[segment], sum);
  }
  if (!IsHighestBlock()) return 0;
  if (segments == 1) return SumOfMailboxes(p.sample_loss, p.batch, wait_ns, shared);
  return SumOfMailboxes(p.segment_loss, segments, wait_ns, shared);
}

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_LOSS_SUM_CUH_
