// The center loss step on a GPU: the launcher's contract in plain C++, without a CUDA header.

#ifndef TF_CENTER_LOSS_OP_CUDA_CENTER_LOSS_CUDA_H_
#define TF_CENTER_LOSS_OP_CUDA_CENTER_LOSS_CUDA_H_

#include <cstdint>

#include "csrc/center_loss.h"

namespace tcl {

// The largest batch of a launch.
constexpr int64_t kMostCudaSamples = int64_t{1} << 22;

// Launch constants. `python -m bench.gpu --tune` compares others with these defaults. The first
// three also decide the order in which losses are added up.
struct CudaTuning {
  int scan_batch = 1024;   // the largest batch whose labels are scanned; larger ones are hashed
  int scan_threads = 128;  // threads of a block of the scanned form: 64 or 128
  int hash_threads = 256;  // the same of the hashed form: 64, 128 or 256
  int hash_blocks = 2;     // blocks of the hashed form on a multiprocessor
  int wait_ns = 20;        // sleep between two looks at a counter or a mailbox
  int overlap = 1;         // whether a launch may be set up while the one before it ends
};

// One launch constant: its name, the least and the largest value, for programs that try others.
struct CudaTuningField {
  const char* name;
  int CudaTuning::* value;
  int least;
  int largest;
};
constexpr int kCudaTuningFields = 6;
extern const CudaTuningField kCudaTuning[kCudaTuningFields];

// Device memory that the kernel keeps its bookkeeping in, from one launch to the next. All of it
// must be zero before its first launch; every launch leaves it ready for the next one. It serves
// one stream at a time, and batches up to the sizes it was asked for.
struct CudaWorkspace {
  void* memory = nullptr;   // CudaWorkspaceBytes() of device memory, aligned to 16 bytes
  int64_t batch = 0;        // largest B
  int64_t dim = 0;          // largest D
  int64_t center_size = 4;  // bytes of a center's number
  bool atomic = false;      // whether CudaOptions::atomic may be set
  CudaTuning tuning;        // the same for all launches
};

// O(B) bytes, and D numbers for every 16th sample (every second one where `atomic`). Nothing
// depends on the number of classes.
int64_t CudaWorkspaceBytes(const CudaWorkspace& workspace);

// The first bytes of the workspace, which have to be zero where it serves a single launch.
int64_t CudaWorkspaceClearBytes(const CudaWorkspace& workspace);

// The points of a launch at which each block may note the time, see CudaOptions::clock.
constexpr int kCudaPhases = 8;
extern const char* const kCudaPhaseNames[kCudaPhases];

// What a launch may take from device memory instead of from StepOptions, and how it sums.
template <typename Center>
struct CudaOptions {
  const Center* alpha = nullptr;        // one number on the device, null: StepOptions::alpha
  const Center* loss_weight = nullptr;  // one number on the device, null: StepOptions::loss_weight
  // Sums the residuals of a class with float atomics, in whatever order they arrive: the bits of
  // the moved centers then differ from run to run.
  bool atomic = false;
  // [blocks, kCudaPhases] nanoseconds, written as each block passes; null: nothing is noted. A
  // block that skips a point leaves its number as it was.
  uint64_t* clock = nullptr;
};

// The number of blocks that a launch of this batch has on the current device, or a negative
// cudaError_t.
int64_t CudaBlocks(const CudaWorkspace& workspace, int64_t batch);

// Puts the step on `stream` (a cudaStream_t) as one kernel launch and returns at once, with a
// cudaError_t. All pointers of `step` are device memory. A kernel cannot raise: a label that is
// neither in [0, C) nor ignored makes its sample's loss and residual NaN and touches nothing else;
// with an alpha that is negative or not finite no center moves, and the loss and the residual are
// NaN. The bits of the results depend on the inputs alone, and on whether all rows are aligned to
// 16 bytes, unless `atomic`.
template <typename Feature, typename Label>
int CenterLossOnCuda(const StepArguments<Feature, Label>& step,
                     const CudaOptions<CenterType<Feature>>& options,
                     const CudaWorkspace& workspace, void* stream);

// The backward pass: gradient[i, :] = upstream[i] * residual[i, :], or upstream[0] for every row
// where `per_sample` is false, or the residual itself where `upstream` is null; rounded to the
// features' type. `gradient` may be `residual` itself: an upstream of one then costs no memory
// traffic.
template <typename Feature>
int BackwardOnCuda(const CenterType<Feature>* upstream, bool per_sample,
                   const CenterType<Feature>* residual, Feature* gradient, int64_t batch,
                   int64_t dim, void* stream);

// Device memory, and the end of all work on the device.
int AllocateOnCuda(void** memory, int64_t bytes);
void FreeOnCuda(void* memory);
int WaitForCuda();

// Device memory to the host; waits for it.
int CopyFromCuda(void* to, const void* from, int64_t bytes);

// Device memory to device memory, and zeros into it, on the stream.
int CopyOnCuda(void* to, const void* from, int64_t bytes, void* stream);
int ZeroOnCuda(void* memory, int64_t bytes, void* stream);

// The words for a value that the functions above returned.
const char* CudaErrorText(int error);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_CENTER_LOSS_CUDA_H_
