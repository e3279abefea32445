// The interface of the GPU step: what callers pass, and what a launch promises. It is plain C++
// without CUDA headers, so that callers need no CUDA compiler. A stream is passed as a void*
// (cudaStream_t), an error as an int (cudaError_t). center_loss.cu implements it.

#ifndef TF_CENTER_LOSS_OP_CUDA_CENTER_LOSS_CUDA_H_
#define TF_CENTER_LOSS_OP_CUDA_CENTER_LOSS_CUDA_H_

#include <cstdint>

#include "csrc/center_loss.h"

namespace tcl {

// The largest batch of a launch.
constexpr int64_t kMostCudaSamples = int64_t{1} << 22;

// Launch constants. `python -m bench.gpu --tune` compares other values with these defaults. The
// first three also determine the order in which the losses are added up.
struct CudaTuning {
  int scan_batch = 1024;   // largest batch of the scan kernel; larger ones use the hash kernel
  int scan_threads = 128;  // block size of the scan kernel: 64 or 128
  int hash_threads = 256;  // block size of the hash kernel: 64, 128 or 256
  int hash_blocks = 2;     // blocks of the hash kernel on a multiprocessor
  int wait_ns = 20;        // pause between two polls of a counter or a mailbox
  int overlap = 1;         // whether to use programmatic dependent launch (sm_90)
};

// The name and the valid range of a launch constant, for programs that try other values.
struct CudaTuningField {
  const char* name;
  int CudaTuning::* value;
  int least;
  int largest;
};
// Small blocks spread the small batches of the scan kernel over more multiprocessors.
constexpr int kMaxScanThreads = 128, kMaxHashThreads = 256;
inline constexpr CudaTuningField kCudaTuning[] = {
    {"scan_batch", &CudaTuning::scan_batch, 0, 4096},
    {"scan_threads", &CudaTuning::scan_threads, 64, kMaxScanThreads},
    {"hash_threads", &CudaTuning::hash_threads, 64, kMaxHashThreads},
    {"hash_blocks", &CudaTuning::hash_blocks, 1, 8},
    {"wait_ns", &CudaTuning::wait_ns, 0, 1000},
    {"overlap", &CudaTuning::overlap, 0, 1},
};
constexpr int kCudaTuningFields = sizeof(kCudaTuning) / sizeof(kCudaTuning[0]);

// Device memory for hash tables, counters, partial sums and mailboxes. All of it must be zero
// before its first launch; every launch leaves it ready for the next one. Launches that share a
// workspace must run one after the other, as on one stream.
struct CudaWorkspace {
  void* memory = nullptr;   // CudaWorkspaceBytes() of device memory, aligned to 16 bytes
  int64_t batch = 0;        // largest B
  int64_t dim = 0;          // largest D
  int64_t center_size = 4;  // sizeof(Center): 4 or 8
  bool atomic = false;      // whether CudaOptions::atomic may be set
  CudaTuning tuning;        // must not change between launches
};

// The size that a workspace needs: O(B) bytes and D numbers for every 16 samples (every two samples
// if `atomic`). It does not depend on the number of classes.
int64_t CudaWorkspaceBytes(const CudaWorkspace& workspace);

// The number of bytes at its beginning that must be zero if it serves a single launch only.
int64_t CudaWorkspaceClearBytes(const CudaWorkspace& workspace);

// The points of a launch at which the blocks record the time, see CudaOptions::clock.
inline constexpr const char* kCudaPhaseNames[] = {"begun",       "labels here", "labels counted",
                                                  "ranks known", "own samples", "all samples",
                                                  "class sums",  "loss"};
constexpr int kCudaPhases = sizeof(kCudaPhaseNames) / sizeof(kCudaPhaseNames[0]);

// The options of a launch beyond StepOptions.
template <typename Center>
struct CudaOptions {
  // Numbers in device memory that replace those of StepOptions; null: StepOptions.
  const Center* alpha = nullptr;
  const Center* loss_weight = nullptr;
  // Whether to add up the residuals of a class with float atomics, in the order of arrival. The
  // bits of the moved centers then differ from run to run.
  bool atomic = false;
  // [blocks, kCudaPhases] times in nanoseconds; null: record none. A block that skips a point does
  // not write its number.
  uint64_t* clock = nullptr;
};

// The number of blocks of a launch of this batch on the current device, or minus the cudaError_t.
int64_t CudaBlocks(const CudaWorkspace& workspace, int64_t batch);

// Enqueues the step on `stream` as one kernel launch and returns immediately. All pointers of
// `step` are device memory. A kernel cannot raise an error: a label that is neither in [0, C) nor
// ignored makes its sample's loss and scaled residual NaN and has no other effect; an alpha that is
// negative or not finite makes the loss and all scaled residuals NaN, and no center moves. Unless
// `atomic`, the bits of the results depend only on the inputs, on whether all rows are aligned to
// 16 bytes, and on the launch constants (CudaTuning).
template <typename Feature, typename Label>
int CenterLossOnCuda(const StepArguments<Feature, Label>& step,
                     const CudaOptions<CenterType<Feature>>& options,
                     const CudaWorkspace& workspace, void* stream);

// The backward pass: gradient[i, :] = upstream[i] * residual[i, :], rounded to the type of the
// features. `residual` holds the scaled residuals of the step. If `per_sample` is false,
// upstream[0] applies to every row; if `upstream` is null, the factor is one. `gradient` may be
// `residual`; rows with a factor of one are then left alone.
template <typename Feature>
int BackwardOnCuda(const CenterType<Feature>* upstream, bool per_sample,
                   const CenterType<Feature>* residual, Feature* gradient, int64_t batch,
                   int64_t dim, void* stream);

// cudaMalloc, cudaFree and cudaDeviceSynchronize.
int AllocateOnCuda(void** memory, int64_t bytes);
void FreeOnCuda(void* memory);
int WaitForCuda();

// Copies device memory to the host and waits for the end of the copy.
int CopyFromCuda(void* to, const void* from, int64_t bytes);

// Enqueue a copy between device arrays, or zeros for one, on the stream.
int CopyOnCuda(void* to, const void* from, int64_t bytes, void* stream);
int ZeroOnCuda(void* memory, int64_t bytes, void* stream);

// The text of a cudaError_t.
const char* CudaErrorText(int error);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_CENTER_LOSS_CUDA_H_
