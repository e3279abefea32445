// The center loss step on a GPU, in one launch.
//
// Every sample is done by one warp (warp_step.cuh): it reads features and center, writes the
// residual, publishes the loss. Where the sample is alone in its class, or one of two that the warp
// does together, the warp moves the center at once: no other warp reads that row. Of a class of
// three samples or more the sum of the residuals is made when all its samples have read the center,
// in an order that follows from the labels alone (class_sums.cuh).
//
// Two forms find out which samples share a class. ScanStep, for small batches: each warp scans the
// labels (scanned_labels.cuh), and the samples of a class meet at a counter. HashStep: the blocks
// count the labels in a hash table (hashed_labels.cuh) and meet at a grid barrier; a launch with
// classes of three samples or more has a second one. The barriers need all blocks resident: the
// launch is cooperative.
//
// Bytes moved, all labels distinct: features + center read + center written + residual, B D each.
//
// Deterministic: the losses are added up in an order that follows from the size of the batch
// (loss_sum.cuh), the residuals in one that follows from the labels. With `atomic`, the samples of
// a class of several add their residuals to one row of the pool in the order of arrival.

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

// Blocks of the scanned form are small, to spread a small batch over all multiprocessors.
constexpr int kMostScanThreads = 128, kMostHashThreads = 256;

}  // namespace

constexpr CudaTuningField kCudaTuning[] = {
    {"scan_batch", &CudaTuning::scan_batch, 0, 4096},
    {"scan_threads", &CudaTuning::scan_threads, 64, kMostScanThreads},
    {"hash_threads", &CudaTuning::hash_threads, 64, kMostHashThreads},
    {"hash_blocks", &CudaTuning::hash_blocks, 1, 8},
    {"wait_ns", &CudaTuning::wait_ns, 0, 1000},
    {"overlap", &CudaTuning::overlap, 0, 1},
};

const char* const kCudaPhaseNames[] = {"begun",       "labels here", "labels counted",
                                       "ranks known", "own samples", "all samples",
                                       "class sums",  "loss"};

namespace {

enum Phase { kBegun, kLabelsHere, kCounted, kRanked, kOwnDone, kAllDone, kSumsDone, kLossDone };

// Arrives at the chunk of a sample for this warp. Returns whether it is the last one; then
// `all_finite` tells whether all samples were. The center may move once all samples of the class
// have arrived. The arrival depends on what the warp has read of the center, by way of `finite`, so
// it needs no release: no read returns a value that depends on itself.
__device__ __forceinline__ bool LastAtChunk(Arrivals* counter, int members, int finite,
                                            bool* all_finite) {
  Arrivals now = 0;
  if (Lane() == 0) {
    const Arrivals own = kOneArrival + (1 - finite) * kOneSummed;
    now = atomicAdd(counter, own) + own;
    if (static_cast<int>(now & 0xffffffff) == members) *counter = 0;
  }
  now = __shfl_sync(kAllLanes, now, 0);
  *all_finite = now >> 32 == 0;
  return static_cast<int>(now & 0xffffffff) == members;
}

// Rows of class sums in flight: a scanned launch has fewer warps, and so more registers for each.
template <typename Feature>
constexpr int kHashLoads = 48 / sizeof(CenterType<Feature>);
template <typename Feature>
constexpr int kScanLoads = 128 / sizeof(CenterType<Feature>);

// A launch of a small batch. Each warp has one sample.
template <typename Feature, int Width>
__global__ void __launch_bounds__(kMostScanThreads, 2)
    ScanStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  OverlapLaunches();
  p.Stamp(kBegun);
  using Step = WarpStep<Feature, Width>;
  using Sum = typename Step::Sum;
  Step step(p);
  const int block_warps = static_cast<int>(blockDim.x) / kWarp;
  const int warps = static_cast<int>(gridDim.x) * block_warps;
  const int warp = static_cast<int>(blockIdx.x) * block_warps + WarpOfBlock();
  // The chunks that the warps of this block are the last to arrive at, and their samples.
  Chunk* const completed = reinterpret_cast<Chunk*>(shared);             // [block_warps]
  int* const members = reinterpret_cast<int*>(completed + block_warps);  // [block_warps, kChunk]
  // The sample's rows are on their way while the labels are scanned.
  typename Step::Loaded loaded;
  int64_t label = 0;
  if (warp < p.batch) {
    label = p.Label(warp);
    step.Load(warp, label, 0, &loaded);
  }
  ScannedLabels<Feature> labels(p,
                                reinterpret_cast<unsigned char*>(members + kChunk * block_warps));
  ClassSums<Feature, Width, kScanLoads<Feature>> sums(p, step);
  p.Stamp(kLabelsHere);
  step.SetCounted(labels.Counted());
  for (int first = warp - WarpOfBlock(); first < p.batch; first += warps) {  // of the block
    const int i = first + WarpOfBlock();
    Chunk own;
    if (i < p.batch) {
      const bool is_member = step.IsMember(label);
      if (is_member) labels.SetClass(i);
      const int count = is_member ? labels.count() : 0;
      if (count <= 1) {
        step.DoSample(i, -1, label, loaded, is_member ? Sum::kMovesCenter : Sum::kUnused);
      } else if (count == 2) {
        if (labels.rank() == 0) {
          step.LoadPartner(labels.other(), 0, &loaded);
          step.DoSample(i, labels.other(), label, loaded, Sum::kMovesCenter);
        }
      } else {
        const int finite = step.DoSample(i, -1, label, loaded, Sum::kLeft);
        const int place = labels.SortedPlace(), chunk = labels.rank() / kChunk;
        const int in_chunk = min(count - chunk * kChunk, kChunk);
        if (LastAtChunk(p.chunk_arrivals + place + chunk, in_chunk, finite, &own.all_finite)) {
          own.label = label;
          own.chunks = (count + kChunk - 1) / kChunk;
          own.chunk = chunk;
          own.count = in_chunk;
          own.first_pool_row = place / kSamplesPerPoolRow;
          labels.Find(chunk * kChunk, in_chunk, members + kChunk * WarpOfBlock());
        }
      }
    }
    if (Lane() == 0) completed[WarpOfBlock()] = own;
    if (__syncthreads_or(own.chunks > 0)) {
      const int slices = Slices<Feature, Width>(p.dim);
      for (int task = WarpOfBlock(); task < block_warps * slices; task += block_warps) {
        const int k = task / slices;
        if (completed[k].chunks > 0) {
          sums.DoSlice(completed[k], members + kChunk * k, task % slices);
        }
      }
      __syncthreads();  // all warps have read what was completed
    }
    if (i + warps < p.batch) {
      label = labels.LabelAt(i + warps);
      step.Load(i + warps, label, 0, &loaded);
    }
  }
  p.Stamp(kOwnDone);
  if (!step.reduces_loss() || !IsLastBlock()) return;
  const double loss = SumOfMailboxes(p.sample_loss, p.batch, p.tuning.wait_ns, shared);
  if (threadIdx.x == 0) step.StoreLossSum(loss);
  p.Stamp(kLossDone);
}

template <typename Feature, int Width, bool kAtomic>
__global__ void __launch_bounds__(kMostHashThreads, 2)
    HashStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  OverlapLaunches();
  p.Stamp(kBegun);
  using Step = WarpStep<Feature, Width>;
  using Sum = typename Step::Sum;
  Step step(p);
  const int parity = __ldcg(&p.header->parity);
  HashedLabels<Feature> labels(p, parity);
  Counters& counters = p.header->counters[parity];
  const int blocks = static_cast<int>(gridDim.x);
  // A round is kWarp samples for each warp, one in each lane. They lie warps + 1 apart: neighbors,
  // and labels that come again after a while, are for different warps.
  const int warps = blocks * static_cast<int>(blockDim.x) / kWarp;
  const int warp = WarpOfBlock() * blocks + static_cast<int>(blockIdx.x);
  const int round = kWarp * warps;
  const int own = Lane() * warps + (warp + Lane()) % warps;
  typename Step::Loaded loaded;
  int64_t own_label = 0;  // of the first round, and its owner
  int own_owner = -1, counted = 0;
  for (int first = 0; first < p.batch; first += round) {
    const int i = first + own;
    const int64_t label = i < p.batch ? p.Label(i) : 0;
    if (first == 0) own_label = label;
    const int owner = labels.Enter(i, label, i < p.batch && step.IsMember(label), kAtomic);
    if (first == 0) own_owner = owner;
    counted += i < p.batch && !p.Ignored(label);
  }
  if (p.options.has_ignore_class) labels.Count(counted);
  p.Stamp(kLabelsHere);
  ArriveBlock(&counters.counted_blocks.value);
  // The rows of the first sample come while the blocks wait for each other. (Earlier they would
  // delay the counting.)
  if (warp < p.batch) step.Load(warp, __shfl_sync(kAllLanes, own_label, 0), 0, &loaded);
  HashedLabels<Feature>::ClearNext(p, 1 - parity);
  WaitAsBlock(&counters.counted_blocks.value, blocks, p.tuning.wait_ns);
  p.Stamp(kCounted);
  step.SetCounted(labels.Counted());

  const bool has_large = !kAtomic && labels.HasLarge();
  if (has_large && labels.HasHeavy()) {
    labels.RankHeavy();
    p.Stamp(kRanked);
    // Again, to spare the registers.
    if (warp < p.batch) step.Load(warp, __shfl_sync(kAllLanes, own_label, 0), 0, &loaded);
  }
  // Memory does not serve all multiprocessors alike. Of a large batch each warp does three quarters
  // of its share, and then takes groups of what is left.
  const int share = p.batch / warps;
  const int fixed = share < 6 ? kWarp : min(share * 3 / 4, kWarp);
  const int begin = min(fixed * warps, p.batch);  // of the groups
  int i = Lane() < fixed ? own : p.batch;
  int64_t label = own_label;
  int owner = own_owner;
  int ticket = begin < p.batch && Lane() == 0 ? labels.TakeTicket() : 0;
  bool is_first = true;
  for (;;) {
    const int count = i >= p.batch || owner < 0 ? 0 : labels.CountOf(owner);
    const int partner = count > 0 && owner == i ? labels.PartnerOf(i) : -1;  // of a pair
    // The next group's, long before they are needed.
    const int group = begin + __shfl_sync(kAllLanes, ticket, 0) * kGroup;
    const int next = Lane() < kGroup ? min(group + Lane(), p.batch) : p.batch;
    const int64_t next_label = next < p.batch ? p.Label(next) : 0;
    const int next_owner = next < p.batch ? labels.OwnerOf(next) : -1;
    if (group < p.batch && Lane() == 0) ticket = labels.TakeTicket();
    if (has_large) labels.ListChunks(i, owner == i ? count : 0);
    // A pair is for its owner's warp.
    const bool does = i < p.batch && (kAtomic || count != 2 || owner == i);
    unsigned left = __ballot_sync(kAllLanes, does);
    bool is_loaded = is_first && (left & 1) != 0;
    while (left != 0) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const int j = __shfl_sync(kAllLanes, i, lane);
      const int64_t its_label = __shfl_sync(kAllLanes, label, lane);
      const int its_count = __shfl_sync(kAllLanes, count, lane);
      const int its_partner =
          !kAtomic && its_count == 2 ? __shfl_sync(kAllLanes, partner, lane) : -1;
      const int its_owner = __shfl_sync(kAllLanes, owner, lane);
      if (!is_loaded) step.Load(j, its_label, 0, &loaded);
      if (its_partner >= 0) step.LoadPartner(its_partner, 0, &loaded);
      is_loaded = false;
      if (kAtomic && its_count > 1) {
        step.AddAtomically(j, its_label, loaded, its_count, p.first_pool_row[its_owner]);
      } else if (its_count > 2) {
        const int finite = step.DoSample(j, -1, its_label, loaded, Sum::kLeft);
        if (finite == 0 && Lane() == 0) labels.CountNotFinite(its_owner);
      } else {
        step.DoSample(j, its_partner, its_label, loaded,
                      its_count == 0 ? Sum::kUnused : Sum::kMovesCenter);
      }
      left &= left - 1;
    }
    if (group >= p.batch) break;
    i = next;
    label = next_label;
    owner = next_owner;
    is_first = false;
  }
  p.Stamp(kOwnDone);
  if (has_large) ArriveBlock(&counters.done_blocks.value);
  const double loss = step.reduces_loss() ? SumOfUnits(p, shared) : 0;
  if (has_large) {
    WaitAsBlock(&counters.done_blocks.value, blocks, p.tuning.wait_ns);
    p.Stamp(kAllDone);
    ClassSums<Feature, Width, kHashLoads<Feature>> sums(p, step);
    int* const members = reinterpret_cast<int*>(shared) + kChunk * WarpOfBlock();
    const int slices = Slices<Feature, Width>(p.dim);
    const int tasks = labels.Chunks() * slices;
    for (int task = warp; task < tasks; task += warps) {
      __syncwarp();  // the members of the task before have been read
      const Chunk chunk = labels.FindChunk(task / slices, members);
      __syncwarp();
      sums.DoSlice(chunk, members, task % slices);
    }
    p.Stamp(kSumsDone);
  }
  if (!IsLastBlock() || threadIdx.x != 0) return;
  if (step.reduces_loss()) step.StoreLossSum(loss);
  p.Stamp(kLossDone);
  // Each block had read the parity when it arrived at counted_blocks.
  p.header->slots[parity] = p.slots;
  p.header->samples[parity] = p.batch;
  p.header->parity = 1 - parity;
}

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

// What a launch asks of the current device.
struct Device {
  int multiprocessors = 0;
  bool can_overlap = false;  // whether the kernels were compiled to wait for the launch before
};

// Remembered for the thread, because the questions cost more than a launch.
cudaError_t CurrentDevice(Device* device) {
  static thread_local int known_number = -1;
  static thread_local Device known;
  int number;
  if (const cudaError_t error = cudaGetDevice(&number); error != cudaSuccess) return error;
  if (number != known_number) {
    cudaError_t error =
        cudaDeviceGetAttribute(&known.multiprocessors, cudaDevAttrMultiProcessorCount, number);
    if (error != cudaSuccess) return error;
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, ScanStep<float, 4>);
    if (error != cudaSuccess) return error;
    known.can_overlap = attributes.ptxVersion >= 90;  // see OverlapLaunches
    known_number = number;
  }
  *device = known;
  return cudaSuccess;
}

int64_t Largest(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t Smallest(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

// The shape of a launch.
struct Shape {
  bool scans;     // ScanStep, or HashStep
  bool overlaps;  // the end of the launch before
  int threads;
  int64_t blocks;
};

cudaError_t ShapeOf(const CudaTuning& tuning, int64_t batch, bool atomic, Shape* shape) {
  Device device;
  if (const cudaError_t error = CurrentDevice(&device); error != cudaSuccess) return error;
  shape->overlaps = tuning.overlap != 0 && device.can_overlap;
  shape->scans = batch <= tuning.scan_batch && !atomic;
  shape->threads = shape->scans ? tuning.scan_threads : tuning.hash_threads;
  // A scanned launch does not need all blocks resident: a few more than there is room for keep the
  // multiprocessors busy.
  const int64_t most = device.multiprocessors * int64_t{shape->scans ? 8 : tuning.hash_blocks};
  shape->blocks = Largest(Smallest(Quotient(batch, shape->threads / kWarp), most), 1);
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
  // The losses are added up last, in memory that the rest needs no more.
  int64_t shared = warps * kChunk * kInt;
  if (shape.scans) {
    shared +=
        warps * static_cast<int64_t>(sizeof(Chunk)) + ScannedLabels<Feature>::SharedBytes(p.batch);
    return Launch(ScanStep<Feature, Width>, shape, shared, p, stream);
  }
  if (p.cuda.atomic) return Launch(HashStep<Feature, Width, true>, shape, shared, p, stream);
  return Launch(HashStep<Feature, Width, false>, shape, shared, p, stream);
}

bool IsPowerOfTwo(int number) { return number > 0 && (number & (number - 1)) == 0; }

bool IsValid(const CudaTuning& tuning) {
  for (const CudaTuningField& field : kCudaTuning) {
    const int value = tuning.*field.value;
    if (value < field.least || value > field.largest) return false;
  }
  return IsPowerOfTwo(tuning.scan_threads) && IsPowerOfTwo(tuning.hash_threads);
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

int64_t CudaWorkspaceBytes(const CudaWorkspace& workspace) { return Layout(workspace).bytes; }

int64_t CudaWorkspaceClearBytes(const CudaWorkspace& workspace) {
  return Layout(workspace).clear_bytes;
}

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
  const Layout layout(workspace);
  unsigned char* const memory = static_cast<unsigned char*>(workspace.memory);
  const auto at = [memory](int64_t offset) { return static_cast<void*>(memory + offset); };
  Parameters<Feature> p;
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
  p.header = static_cast<Header*>(at(layout.header));
  for (int k = 0; k < 2; ++k) {
    p.table[k] = static_cast<unsigned long long*>(at(layout.table[k]));
    p.others[k] = static_cast<int*>(at(layout.others[k]));
  }
  p.slots = static_cast<int>(Layout::SlotsFor(step.batch));
  p.members = static_cast<int*>(at(layout.members));
  p.owner_of = static_cast<int*>(at(layout.owner_of));
  p.heavy_class = static_cast<int*>(at(layout.heavy_class));
  p.tile_part = static_cast<unsigned*>(at(layout.tile_part));
  p.tile_order = static_cast<int*>(at(layout.tile_order));
  p.first_chunk = static_cast<int*>(at(layout.first_chunk));
  p.first_pool_row = static_cast<int*>(at(layout.first_pool_row));
  p.class_of_chunk = static_cast<int*>(at(layout.class_of_chunk));
  p.not_finite = static_cast<int*>(at(layout.not_finite));
  p.pool_rows = layout.pool_rows;
  p.pool = static_cast<Center*>(at(layout.pool));
  p.arrivals = static_cast<Arrivals*>(at(layout.arrivals));
  p.chunk_arrivals = static_cast<Arrivals*>(at(layout.chunk_arrivals));
  p.sample_loss = static_cast<Mailbox<Center>*>(at(layout.sample_loss));
  p.unit_loss = static_cast<Mailbox<double>*>(at(layout.unit_loss));

  // Whole vectors where every row starts on one.
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
  config.gridDim = dim3(
      static_cast<unsigned>(Smallest(Quotient(batch, 8), int64_t{8} * device.multiprocessors)));
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
