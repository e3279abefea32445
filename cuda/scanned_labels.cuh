// Labels of the scan kernel, for small batches: every block copies all labels to shared memory, and
// each warp scans them for the samples of its class. The blocks need no hash table and no barrier.

#ifndef TF_CENTER_LOSS_OP_CUDA_SCANNED_LABELS_CUH_
#define TF_CENTER_LOSS_OP_CUDA_SCANNED_LABELS_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

template <typename Feature>
class ScannedLabels {
 public:
  __device__ ScannedLabels(const Parameters<Feature>& p, unsigned char* shared)
      : p_(p), labels_(reinterpret_cast<int64_t*>(shared)) {
    constexpr int kLoads = 8;  // of a thread, in flight together
    const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x); first < p.batch; first += kLoads * threads) {
      int64_t labels[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) labels[k] = p.Label(min(first + k * threads, p.batch - 1));
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        if (first + k * threads < p.batch) labels_[first + k * threads] = labels[k];
      }
    }
    if (threadIdx.x == 0 && p.batch % 2 == 1) labels_[p.batch] = -1;  // a pad that equals no class
    __syncthreads();
  }

  static int64_t SharedBytes(int64_t batch) {
    return (batch + 1) / 2 * 2 * static_cast<int64_t>(sizeof(int64_t));
  }

  __device__ int64_t LabelAt(int i) const { return labels_[i]; }

  __device__ int Counted() const {
    if (!p_.options.has_ignore_class) return p_.batch;
    int counted = 0;
    for (int i = Lane(); i < p_.batch; i += kWarp) counted += !p_.Ignored(labels_[i]);
    return WarpSum(counted);
  }

  // Selects the class of sample i for the functions below.
  __device__ void SetClass(int i) {
    label_ = labels_[i];
    int all = 0, before = 0, other = -1;
#pragma unroll 4
    for (int j = 2 * Lane(); j < p_.batch; j += 2 * kWarp) {
      const longlong2 two = *reinterpret_cast<const longlong2*>(labels_ + j);
      all += (two.x == label_) + (two.y == label_);
      before += (two.x == label_ && j < i) + (two.y == label_ && j + 1 < i);
      if (two.x == label_ && j != i) other = j;
      if (two.y == label_ && j + 1 != i) other = j + 1;
    }
    const int both = WarpSum(all << 16 | before);  // B <= 4096, so 16 bits are enough for each
    count_ = both >> 16;
    rank_ = both & 0xffff;
    const unsigned others = __ballot_sync(kAllLanes, other >= 0);
    other_ = others == 0 ? -1 : __shfl_sync(kAllLanes, other, __ffs(static_cast<int>(others)) - 1);
  }

  __device__ int count() const { return count_; }
  __device__ int rank() const { return rank_; }    // number of earlier samples of the class
  __device__ int other() const { return other_; }  // another sample of the class; -1: none

  // Stores the positions of the samples with the ranks first to first + count - 1.
  __device__ void GatherRanks(int first, int count, int* members) const {
    int before = 0;
    for (int start = 0; start < p_.batch && before < first + count; start += kWarp) {
      const int j = start + Lane();
      const bool same = j < p_.batch && labels_[j] == label_;
      const unsigned all = __ballot_sync(kAllLanes, same);
      const int rank = before + __popc(all & ((1u << Lane()) - 1));
      if (same && rank >= first && rank < first + count) members[rank - first] = j;
      before += __popc(all);
    }
  }

  // The offset of the class in the batch sorted by label. Classes have disjoint ranges from there,
  // so the offset assigns counters and partial sums to them without communication.
  __device__ int SortedOffset() const {
    int smaller = 0;
    for (int j = Lane(); j < p_.batch; j += kWarp) smaller += labels_[j] < label_;
    return WarpSum(smaller);
  }

 private:
  const Parameters<Feature>& p_;
  int64_t* labels_;  // [B], padded to pairs
  int64_t label_ = 0;
  int count_ = 0;
  int rank_ = 0;
  int other_ = -1;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_SCANNED_LABELS_CUH_
