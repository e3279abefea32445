// The kernels and their launchers (center_loss_cuda.h is the interface). One launch does a whole
// step: it reads features, labels and centers, and writes scaled residuals, loss and moved centers.
// The backward pass is a small kernel of its own. CONTRIBUTING.md defines the terms.
//
// One warp processes each sample, or both samples of a pair (warp_step.cuh). A center may move only
// when all samples of its class have read it. If no other warp has a sample of the class, the warp
// moves the center at once. The center of a large class (three samples or more) moves later, by the
// sum of its residuals, which are computed again from features and center (class_sums.cuh).
//
// ScanStep is for small batches. It avoids the latency of a hash table and of grid barriers:
//   1. Each block copies all labels to shared memory (scanned_labels.cuh).
//   2. Each warp scans them for the class of its sample and processes the sample.
//   3. A warp whose sample is in a large class arrives at the counter of the sample's chunk. The
//      block of the last warp to arrive sums the residuals of the chunk: after a block barrier, all
//      warps of that block share the column slices. When all chunks of the class are summed, the
//      center moves.
//   4. The block with the highest index waits for all losses and adds them up (loss_sum.cuh).
//
// HashStep is for large batches. It is a cooperative launch, because a grid barrier waits for all
// blocks, so all must be resident. Two sets of counters and hash table take turns from launch to
// launch (struct Header).
//   1. The blocks insert the labels of their samples into the hash table (hashed_labels.cuh).
//      Grid barrier labels_counted: afterwards the size of every class is final. Between arrival
//      and wait, each warp loads the rows of its first sample, and the blocks clear the other set.
//   2. The blocks sort the samples of multi-chunk classes, if there are any, so that a sample can
//      be found by its rank.
//   3. Each warp processes samples, and lists the chunks of those large classes whose owners are
//      among them.
//      Grid barrier centers_read, if there are large classes: afterwards their centers may move,
//      and ranks and chunks are known. Between arrival and wait, the losses are added up.
//   4. The warps sum the residuals of the large classes, a column slice of a chunk at a time.
//   5. The block with the highest index stores the loss and selects the other set for the next
//      launch.
// With `atomic` there are no steps 2 and 4, no list of chunks and no barrier centers_read. In every
// class of two samples or more, the samples add their residuals to one partial sum in the order of
// arrival, and the last warp to arrive moves the center.
//
// Without `atomic` the results are deterministic. The inputs alone fix the order of the additions
// to the centers. The order of the additions to the losses also depends on whether all rows are
// aligned, and on the launch constants scan_batch, scan_threads and hash_threads.
//
// If all labels are distinct, a launch reads or writes 4 B D numbers: features, scaled residuals,
// and each center twice.

#include <algorithm>
#include <cstdint>

#include "cuda/center_loss_cuda.h"
#include "cuda/class_sums.cuh"
#include "cuda/device.cuh"
#include "cuda/hashed_labels.cuh"
#include "cuda/loss_sum.cuh"
#include "cuda/scanned_labels.cuh"
#include "cuda/warp_step.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// In the order of kCudaPhaseNames.
enum Phase { kBegun, kLabelsHere, kCounted, kRanked, kOwnDone, kAllDone, kSumsDone, kLossDone };

// The warp arrives at the counter of its sample's chunk. `finite` is 1 if the sample's features are
// finite, otherwise 0; the upper half of the counter counts the samples that are not finite.
// Returns whether the warp is the last to arrive of the chunk's `samples`. The counter is then zero
// again, and `all_finite` tells whether all samples of the chunk have finite features. A relaxed
// addition is enough: the warp computes `finite` from what it read from the center, so it has read
// the center before it arrives, and no later move can change what it read.
__device__ __forceinline__ bool LastAtChunk(Arrivals* counter, int samples, int finite,
                                            bool* all_finite) {
  Arrivals now = 0;
  if (Lane() == 0) {
    const Arrivals own = kOneArrival + (1 - finite) * kOneSummed;
    now = atomicAdd(counter, own) + own;
    if (static_cast<int>(now & 0xffffffff) == samples) *counter = 0;
  }
  now = __shfl_sync(kAllLanes, now, 0);
  *all_finite = now >> 32 == 0;
  return static_cast<int>(now & 0xffffffff) == samples;
}

// Rows that ClassSums loads together. ScanStep has smaller blocks, and so more registers for each
// thread.
template <typename Feature>
constexpr int kHashLoads = 48 / sizeof(CenterType<Feature>);
template <typename Feature>
constexpr int kScanLoads = 128 / sizeof(CenterType<Feature>);

// Two blocks on a multiprocessor leave each thread as many registers as it can have (255).
template <typename Feature, int Width>
__global__ void __launch_bounds__(kMaxScanThreads, 2)
    ScanStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  OverlapLaunches();
  p.Stamp(kBegun);
  using Step = WarpStep<Feature, Width>;
  using Use = typename Step::Use;
  Step step(p);
  const int block_warps = static_cast<int>(blockDim.x) / kWarp;
  const int warps = static_cast<int>(gridDim.x) * block_warps;
  const int warp = static_cast<int>(blockIdx.x) * block_warps + WarpOfBlock();
  // For each warp of the block, the chunk that it completed as the last warp to arrive, and the
  // members of that chunk.
  Chunk* const completed = reinterpret_cast<Chunk*>(shared);             // [block_warps]
  int* const members = reinterpret_cast<int*>(completed + block_warps);  // [block_warps, kChunk]
  // Load the first sample's rows now; the scan of the labels hides their latency.
  typename Step::Rows rows;
  int64_t label = 0;
  if (warp < p.batch) {
    label = p.Label(warp);
    step.Load(warp, label, 0, &rows);
  }
  ScannedLabels<Feature> labels(p,
                                reinterpret_cast<unsigned char*>(members + kChunk * block_warps));
  ClassSums<Feature, Width, kScanLoads<Feature>> sums(p, step);
  p.Stamp(kLabelsHere);
  step.SetCounted(labels.Counted());
  // `first` is the sample of the block's first warp. The loop runs on it and not on `i`, so that
  // all warps of the block, with or without a sample, reach the block barriers.
  for (int first = warp - WarpOfBlock(); first < p.batch; first += warps) {
    const int i = first + WarpOfBlock();
    Chunk own;
    if (i < p.batch) {
      const bool moves_center = step.MovesCenter(label);
      if (moves_center) labels.SetClass(i);
      const int count = moves_center ? labels.count() : 0;
      if (count <= 1) {
        step.ProcessSample(i, -1, label, rows, moves_center ? Use::kMoveCenter : Use::kNone);
      } else if (count == 2) {
        if (labels.rank() == 0) {
          step.LoadPartner(labels.other(), 0, &rows);
          step.ProcessSample(i, labels.other(), label, rows, Use::kMoveCenter);
        }
      } else {
        const int finite = step.ProcessSample(i, -1, label, rows, Use::kDefer);
        // The class has the entries from `offset` on of `chunk_arrivals`, one for each chunk, and
        // if it is multi-chunk, the partial sums from offset / kSamplesPerPartialSum on. No other
        // class uses them.
        const int offset = labels.SortedOffset(), chunk = labels.rank() / kChunk;
        const int in_chunk = min(count - chunk * kChunk, kChunk);
        if (LastAtChunk(p.chunk_arrivals + offset + chunk, in_chunk, finite, &own.all_finite)) {
          own.label = label;
          own.chunks = (count + kChunk - 1) / kChunk;
          own.chunk = chunk;
          own.count = in_chunk;
          own.first_partial_sum = offset / kSamplesPerPartialSum;
          labels.GatherRanks(chunk * kChunk, in_chunk, members + kChunk * WarpOfBlock());
        }
      }
    }
    if (Lane() == 0) completed[WarpOfBlock()] = own;
    if (__syncthreads_or(own.chunks > 0)) {
      const int slices = Slices<Feature, Width>(p.dim);
      for (int task = WarpOfBlock(); task < block_warps * slices; task += block_warps) {
        const int k = task / slices;
        if (completed[k].chunks > 0) {
          sums.ProcessSlice(completed[k], members + kChunk * k, task % slices);
        }
      }
      __syncthreads();  // all warps have read `completed` and `members`
    }
    if (i + warps < p.batch) {
      label = labels.LabelAt(i + warps);
      step.Load(i + warps, label, 0, &rows);
    }
  }
  p.Stamp(kOwnDone);
  if (!step.reduces_loss() || !IsHighestBlock()) return;
  const double loss = SumOfMailboxes(p.sample_loss, p.batch, p.tuning.wait_ns, shared);
  if (threadIdx.x == 0) step.StoreLossSum(loss);
  p.Stamp(kLossDone);
}

// Two blocks on a multiprocessor leave each thread 128 registers (see kPerLane).
template <typename Feature, int Width, bool kAtomic>
__global__ void __launch_bounds__(kMaxHashThreads, 2)
    HashStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  OverlapLaunches();
  p.Stamp(kBegun);
  using Step = WarpStep<Feature, Width>;
  using Use = typename Step::Use;
  Step step(p);
  const int parity = __ldcg(&p.header->parity);
  HashedLabels<Feature> labels(p, parity);
  Counters& counters = p.header->counters[parity];
  const int blocks = static_cast<int>(gridDim.x);
  // In a round each lane has one sample: lane l of warp w has sample l * warps + (w + l) % warps.
  // The numbers of samples of two warps differ by one at most, for every batch size. The shift by
  // the lane spreads labels that repeat with a period of `warps` over the warps; without it all
  // lanes of a warp would have the same label.
  const int warps = blocks * static_cast<int>(blockDim.x) / kWarp;
  const int warp = WarpOfBlock() * blocks + static_cast<int>(blockIdx.x);
  const int round = kWarp * warps;
  const int own = Lane() * warps + (warp + Lane()) % warps;
  typename Step::Rows rows;
  int64_t own_label = 0;  // of the first round, as is own_owner
  int own_owner = -1, counted = 0;
  for (int first = 0; first < p.batch; first += round) {
    const int i = first + own;
    const int64_t label = i < p.batch ? p.Label(i) : 0;
    if (first == 0) own_label = label;
    const int owner = labels.Insert(i, label, i < p.batch && step.MovesCenter(label), kAtomic);
    if (first == 0) own_owner = owner;
    counted += i < p.batch && !p.Ignored(label);
  }
  if (p.options.has_ignore_class) labels.Count(counted);
  p.Stamp(kLabelsHere);
  ArriveBlock(&counters.labels_counted.value);
  // Load the first sample's rows now; the wait hides their latency. Loading them earlier would
  // compete with the insertions for memory.
  if (warp < p.batch) step.Load(warp, __shfl_sync(kAllLanes, own_label, 0), 0, &rows);
  HashedLabels<Feature>::ClearNext(p, 1 - parity);
  WaitForBlocks(&counters.labels_counted.value, blocks, p.tuning.wait_ns);
  p.Stamp(kCounted);
  step.SetCounted(labels.Counted());

  const bool has_large = !kAtomic && labels.HasLarge();
  if (has_large && labels.HasMultiChunk()) {
    labels.SortIntoTiles();
    p.Stamp(kRanked);
    // Load again: keeping the rows while sorting would cost registers.
    if (warp < p.batch) step.Load(warp, __shfl_sync(kAllLanes, own_label, 0), 0, &rows);
  }
  // Multiprocessors get unequal memory bandwidth. So with six samples or more for each warp, only
  // three quarters of the batch (and at most 32 samples for each warp) are assigned in advance. The
  // warps take the others by tickets.
  const int share = p.batch / warps;
  const int assigned = share < 6 ? kWarp : min(share * 3 / 4, kWarp);  // of a warp
  const int begin = min(assigned * warps, p.batch);                    // of the other samples
  int i = Lane() < assigned ? own : p.batch;
  int64_t label = own_label;
  int owner = own_owner;
  int ticket = begin < p.batch && Lane() == 0 ? labels.TakeTicket() : 0;
  bool is_first = true;
  for (;;) {
    const int count = i >= p.batch || owner < 0 ? 0 : labels.CountOf(owner);
    const int partner = count > 0 && owner == i ? labels.PartnerOf(i) : -1;
    // Load labels and owners of the next ticket's samples now; the work below hides their latency.
    const int next_first = begin + __shfl_sync(kAllLanes, ticket, 0) * kSamplesPerTicket;
    const int next = Lane() < kSamplesPerTicket ? min(next_first + Lane(), p.batch) : p.batch;
    const int64_t next_label = next < p.batch ? p.Label(next) : 0;
    const int next_owner = next < p.batch ? labels.OwnerOf(next) : -1;
    if (next_first < p.batch && Lane() == 0) ticket = labels.TakeTicket();
    if (has_large) labels.ListChunks(i, owner == i ? count : 0);
    // A pair is processed by the owner's warp.
    const bool takes = i < p.batch && (kAtomic || count != 2 || owner == i);
    unsigned left = __ballot_sync(kAllLanes, takes);
    bool is_loaded = is_first && (left & 1) != 0;
    while (left != 0) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const int j = __shfl_sync(kAllLanes, i, lane);
      const int64_t its_label = __shfl_sync(kAllLanes, label, lane);
      const int its_count = __shfl_sync(kAllLanes, count, lane);
      const int its_partner =
          !kAtomic && its_count == 2 ? __shfl_sync(kAllLanes, partner, lane) : -1;
      const int its_owner = __shfl_sync(kAllLanes, owner, lane);
      if (!is_loaded) step.Load(j, its_label, 0, &rows);
      if (its_partner >= 0) step.LoadPartner(its_partner, 0, &rows);
      is_loaded = false;
      if (kAtomic && its_count > 1) {
        step.AddAtomically(j, its_label, rows, its_count, p.first_partial_sum[its_owner]);
      } else if (its_count > 2) {
        const int finite = step.ProcessSample(j, -1, its_label, rows, Use::kDefer);
        if (finite == 0 && Lane() == 0) labels.CountNonFinite(its_owner);
      } else {
        step.ProcessSample(j, its_partner, its_label, rows,
                           its_count == 0 ? Use::kNone : Use::kMoveCenter);
      }
      left &= left - 1;
    }
    if (next_first >= p.batch) break;
    i = next;
    label = next_label;
    owner = next_owner;
    is_first = false;
  }
  p.Stamp(kOwnDone);
  if (has_large) ArriveBlock(&counters.centers_read.value);
  const double loss = step.reduces_loss() ? SumOfLosses(p, shared) : 0;
  if (has_large) {
    WaitForBlocks(&counters.centers_read.value, blocks, p.tuning.wait_ns);
    p.Stamp(kAllDone);
    ClassSums<Feature, Width, kHashLoads<Feature>> sums(p, step);
    int* const members = reinterpret_cast<int*>(shared) + kChunk * WarpOfBlock();
    const int slices = Slices<Feature, Width>(p.dim);
    const int tasks = labels.Chunks() * slices;
    for (int task = warp; task < tasks; task += warps) {
      __syncwarp();  // all lanes have read the members of the previous task
      const Chunk chunk = labels.FindChunk(task / slices, members);
      __syncwarp();
      sums.ProcessSlice(chunk, members, task % slices);
    }
    p.Stamp(kSumsDone);
  }
  if (!IsHighestBlock() || threadIdx.x != 0) return;
  if (step.reduces_loss()) step.StoreLossSum(loss);
  p.Stamp(kLossDone);
  // All blocks have read the parity: each did so before it arrived at labels_counted. The next
  // launch uses the other set and clears this one: `slots` and `samples` tell it how much of it.
  p.header->slots[parity] = p.slots;
  p.header->samples[parity] = p.batch;
  p.header->parity = 1 - parity;
}

// gradient = upstream * residual, rounded to the type of the features; one warp for each row.
// `residual` holds the scaled residuals of the step.
template <typename Feature>
__global__ void __launch_bounds__(256)
    Backward(const CenterType<Feature>* upstream, bool per_sample,
             const CenterType<Feature>* residual, Feature* gradient, int64_t batch, int64_t dim) {
  const bool in_place = static_cast<const void*>(gradient) == residual;
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / kWarp;
  for (int64_t i = static_cast<int64_t>(blockIdx.x * blockDim.x + threadIdx.x) / kWarp; i < batch;
       i += warps) {
    const CenterType<Feature> factor = upstream == nullptr ? 1 : upstream[per_sample ? i : 0];
    if (in_place && factor == 1) continue;
    for (int64_t column = 0; column < dim; column += kColumns<CenterType<Feature>, 1>) {
      constexpr int kLane = kPerLane<CenterType<Feature>, 1>;
      CenterType<Feature> row[kLane];
      LoadRow<1, Cache::kStreamed>(residual + i * dim, column, dim, row);
      Feature rounded[kLane];
#pragma unroll
      for (int e = 0; e < kLane; ++e) rounded[e] = Round<Feature>(factor * row[e]);
      StoreRow<1, Cache::kStreamed>(gradient + i * dim, column, dim, rounded);
    }
  }
}

// Properties of the current device.
struct Device {
  int multiprocessors = 0;
  // Whether the code that runs was compiled for sm_90 or later. Only that code waits for the
  // previous launch (OverlapLaunches), so only then may launches overlap.
  bool can_overlap = false;
};

// Cached for each host thread, because these queries take longer than a launch.
cudaError_t CurrentDevice(Device* device) {
  static thread_local int known_number = -1;
  static thread_local Device known;
  int number;
  if (const cudaError_t error = cudaGetDevice(&number); error != cudaSuccess) return error;
  if (number != known_number) {
    cudaError_t error =
        cudaDeviceGetAttribute(&known.multiprocessors, cudaDevAttrMultiProcessorCount, number);
    if (error != cudaSuccess) return error;
    cudaFuncAttributes attributes;  // of one kernel: all kernels are compiled for the same devices
    error = cudaFuncGetAttributes(&attributes, ScanStep<float, 4>);
    if (error != cudaSuccess) return error;
    known.can_overlap = attributes.ptxVersion >= 90;
    known_number = number;
  }
  *device = known;
  return cudaSuccess;
}

struct Shape {
  bool scans;     // ScanStep; otherwise HashStep
  bool overlaps;  // programmatic dependent launch
  int threads;
  int64_t blocks;
};

cudaError_t ShapeOf(const CudaTuning& tuning, int64_t batch, bool atomic, Shape* shape) {
  Device device;
  if (const cudaError_t error = CurrentDevice(&device); error != cudaSuccess) return error;
  shape->overlaps = tuning.overlap != 0 && device.can_overlap;
  shape->scans = batch <= tuning.scan_batch && !atomic;
  shape->threads = shape->scans ? tuning.scan_threads : tuning.hash_threads;
  // HashStep needs all blocks resident. ScanStep does not: it may have more blocks than fit (two to
  // four of 128 threads), and the others go to the multiprocessors that are free first.
  const int64_t most = device.multiprocessors * int64_t{shape->scans ? 8 : tuning.hash_blocks};
  shape->blocks =
      std::max<int64_t>(std::min<int64_t>(CeilDiv(batch, shape->threads / kWarp), most), 1);
  return cudaSuccess;
}

template <typename Feature>
cudaError_t Launch(void (*kernel)(Parameters<Feature>), const Shape& shape, int64_t shared,
                   const Parameters<Feature>& p, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (!shape.scans) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.overlaps) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <typename Feature, int Width>
cudaError_t LaunchStep(const Parameters<Feature>& p, void* stream) {
  Shape shape;
  if (const cudaError_t error = ShapeOf(p.tuning, p.batch, p.cuda.atomic, &shape);
      error != cudaSuccess) {
    return error;
  }
  const int64_t warps = shape.threads / kWarp;
  constexpr int64_t kInt = sizeof(int);
  // For each warp, the members of a chunk. The sum of the losses uses the beginning of the same
  // memory, in ScanStep after the chunks and in HashStep before them.
  int64_t shared = warps * kChunk * kInt;
  if (shape.scans) {
    shared +=
        warps * static_cast<int64_t>(sizeof(Chunk)) + ScannedLabels<Feature>::SharedBytes(p.batch);
    return Launch(ScanStep<Feature, Width>, shape, shared, p, stream);
  }
  if (p.cuda.atomic) return Launch(HashStep<Feature, Width, true>, shape, shared, p, stream);
  return Launch(HashStep<Feature, Width, false>, shape, shared, p, stream);
}

bool IsValid(const CudaTuning& tuning) {
  const auto is_power_of_two = [](int number) { return (number & (number - 1)) == 0; };
  for (const CudaTuningField& field : kCudaTuning) {
    const int value = tuning.*field.value;
    if (value < field.least || value > field.largest) return false;
  }
  return is_power_of_two(tuning.scan_threads) && is_power_of_two(tuning.hash_threads);
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

WorkspaceBytes BytesOf(const CudaWorkspace& workspace) {
  Parameters<double> wide;
  Parameters<float> narrow;
  return workspace.center_size == sizeof(double) ? PlaceArrays(workspace, &wide)
                                                 : PlaceArrays(workspace, &narrow);
}

}  // namespace

int64_t CudaWorkspaceBytes(const CudaWorkspace& workspace) { return BytesOf(workspace).all; }

int64_t CudaWorkspaceClearBytes(const CudaWorkspace& workspace) { return BytesOf(workspace).clear; }

int64_t CudaBlocks(const CudaWorkspace& workspace, int64_t batch) {
  Shape shape;
  const cudaError_t error = ShapeOf(workspace.tuning, batch, workspace.atomic, &shape);
  return error == cudaSuccess ? shape.blocks : -static_cast<int64_t>(error);
}

template <typename Feature, typename Label>
int CenterLossOnCuda(const StepArguments<Feature, Label>& step,
                     const CudaOptions<CenterType<Feature>>& options,
                     const CudaWorkspace& workspace, void* stream) {
  using Center = CenterType<Feature>;
  if (step.batch > kMostCudaSamples || step.batch > workspace.batch || step.dim > workspace.dim ||
      workspace.center_size != sizeof(Center) || options.atomic != workspace.atomic ||
      !IsValid(workspace.tuning)) {
    return cudaErrorInvalidValue;
  }
  Parameters<Feature> p;
  PlaceArrays(workspace, &p);
  p.batch = static_cast<int>(step.batch);
  p.dim = step.dim;
  p.classes = step.classes;
  p.features = step.features;
  p.labels = step.labels;
  p.long_labels = sizeof(Label) == 8;
  p.sample_weight = step.sample_weight;
  p.centers = step.centers;
  p.loss = step.loss;
  p.residual = step.residual;
  p.squared_distance = step.squared_distance;
  p.features_are_residuals = step.features_are_residuals;
  p.options = step.options;
  p.cuda = options;
  p.tuning = workspace.tuning;
  p.slots = static_cast<int>(HashSlots(step.batch));

  // Rows are accessed as 16-byte vectors if every row is aligned, otherwise number by number.
  constexpr int kWidth = 16 / sizeof(Center);
  const bool aligned = step.dim % kWidth == 0 && Aligned(step.features) && Aligned(step.centers) &&
                       Aligned(step.residual);
  return aligned ? LaunchStep<Feature, kWidth>(p, stream) : LaunchStep<Feature, 1>(p, stream);
}

template <typename Feature>
int BackwardOnCuda(const CenterType<Feature>* upstream, bool per_sample,
                   const CenterType<Feature>* residual, Feature* gradient, int64_t batch,
                   int64_t dim, void* stream) {
  if (batch * dim == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = CurrentDevice(&device); error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  // At most 8 blocks of 256 threads on a multiprocessor: the 2048 threads that it can hold (sm_90).
  config.gridDim = dim3(static_cast<unsigned>(
      std::min<int64_t>(CeilDiv(batch, 8), int64_t{8} * device.multiprocessors)));
  config.blockDim = dim3(256);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, Backward<Feature>, upstream, per_sample, residual, gradient,
                            batch, dim);
}

int AllocateOnCuda(void** memory, int64_t bytes) {
  return cudaMalloc(memory, static_cast<size_t>(bytes));
}

void FreeOnCuda(void* memory) { cudaFree(memory); }

int WaitForCuda() { return cudaDeviceSynchronize(); }

int CopyFromCuda(void* to, const void* from, int64_t bytes) {
  return cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost);
}

int CopyOnCuda(void* to, const void* from, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                         static_cast<cudaStream_t>(stream));
}

int ZeroOnCuda(void* memory, int64_t bytes, void* stream) {
  return cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
}

const char* CudaErrorText(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#define TCL_INSTANTIATE_STEP(Feature, Label)                                                   \
  template int CenterLossOnCuda(const StepArguments<Feature, Label>&,                          \
                                const CudaOptions<CenterType<Feature>>&, const CudaWorkspace&, \
                                void*);
#define TCL_INSTANTIATE(Feature)                                                            \
  TCL_INSTANTIATE_STEP(Feature, int32_t)                                                    \
  TCL_INSTANTIATE_STEP(Feature, int64_t)                                                    \
  template int BackwardOnCuda(const CenterType<Feature>*, bool, const CenterType<Feature>*, \
                              Feature*, int64_t, int64_t, void*);

TCL_INSTANTIATE(float)
TCL_INSTANTIATE(double)
TCL_INSTANTIATE(Half)
TCL_INSTANTIATE(BFloat16)

}  // namespace tcl
