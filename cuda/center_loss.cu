// The center loss step on a GPU, in one launch.
//
// Work. A class of few samples (nearly all, with many labels) is done by one warp: center and
// features are read once, the residuals written, the sum of the residuals kept in registers, and
// the center moved at once: nobody else reads or writes that row, so no residual can see it moved.
// A larger class is cut into *chunks*, up to kMembers samples of consecutive ranks in batch order,
// and these into *parts* by columns, a warp each, which leave their sums in a pool. The last part
// of a chunk to arrive stores its losses. Of each part, the last of kMembers neighbouring chunks
// adds them up in order; the last part to get there has a *node*; the last of kMembers neighbouring
// nodes adds them up, and so on up a tree, whose root moves the center. By then every part has read
// it.
//
// Counts and ranks (label_ranks.cuh): up to kScanBatch samples, by ScanIndex. For more, by
// HashIndex: all blocks count the labels; a barrier, behind which the samples whose label is alone
// are done, while some blocks rank the others; a second barrier, behind which those are done.
// Barriers need all blocks resident: the launch is cooperative, and begins when all
// multiprocessors have room.
//
// Bytes moved, all labels distinct: B D (features + center read + center written + residual).
//
// Deterministic: ranks, chunks and the tree follow from the labels alone, and the losses are summed
// in an order that follows from the size of the batch (loss_sum.cuh). With `atomic`, each sample of
// a class of several adds its residual to one row of the pool in whatever order, and the last of
// them moves the center.

#include "cuda/center_loss_cuda.h"
#include "cuda/device.cuh"
#include "cuda/label_ranks.cuh"
#include "cuda/loss_sum.cuh"
#include "cuda/rows.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// Up to here a scan of the labels by every warp (B / 32 steps) is cheaper than two barriers.
constexpr int64_t kScanBatch = 2048;
constexpr int kScanThreads = 128;  // small, to spread a small batch over all multiprocessors
constexpr int kScanResident = 4;   // blocks on a multiprocessor: 128 registers a thread
constexpr int kHashThreads = 256;
constexpr int kHashResident = 2;  // blocks on a multiprocessor, for certain

template <typename Feature, int Width>
__global__ void __launch_bounds__(kScanThreads, kScanResident)
    ScanStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  Rows<Feature, Width> rows(p);
  const int warps = static_cast<int>(gridDim.x) * kScanThreads / kWarp;
  const int warp = static_cast<int>(blockIdx.x) * kScanThreads / kWarp + WarpOfBlock();
  rows.PrefetchFeatures(warp);
  ScanIndex<Feature> index(p, shared);
  if (warp < p.batch) rows.PrefetchCenter(index.LabelAt(warp));
  rows.SetCounted(index.Counted());
  for (int i = warp; i < p.batch; i += warps) {
    const int64_t label = index.LabelAt(i);
    const bool counts = rows.moves() && !p.Ignored(label) && p.InTable(label);
    if (counts) index.SetClass(i);
    if (!counts || index.count() == 1) {
      rows.DoAlone(i, label);
    } else if (Pieces(index.count(), p.parts).Has(index.rank())) {
      rows.DoPiece(index);
    }
  }
  if (!rows.reduces_loss() || !IsLastBlock()) return;
  const double loss = SumOfBoxes(p.sample_loss, p.batch, shared);
  if (threadIdx.x == 0) rows.StoreLossSum(loss);
}

template <typename Feature, int Width, bool kAtomic>
__global__ void __launch_bounds__(kHashThreads, kHashResident)
    HashStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  Rows<Feature, Width> rows(p);
  const int parity = __ldcg(&p.header->parity);
  HashIndex<Feature> index(p, parity);
  Counters& counters = p.header->counters[parity];
  const int blocks = static_cast<int>(gridDim.x);
  // Of kWarp times as many samples as there are warps, a warp does one in each lane, to look them
  // up together. They lie warps + 1 apart: neighbours, and labels that come again after a while,
  // are for different warps.
  const int warps = blocks * kHashThreads / kWarp;
  const int warp = static_cast<int>(blockIdx.x) * kHashThreads / kWarp + WarpOfBlock();
  const int own = Lane() * warps + (warp + Lane()) % warps;
  rows.PrefetchFeatures(warp);
  index.Enter(rows.moves());
  ArriveBlock(&counters.counted_blocks.value);
  if (warp < p.batch) rows.PrefetchCenter(p.Label(warp));
  index.Clear(p, 1 - parity);
  WaitAsBlock(&counters.counted_blocks.value, blocks);
  rows.SetCounted(index.Counted());

  if (rows.moves() && !kAtomic) index.RankTiles(reinterpret_cast<int*>(shared));
  if (rows.moves() && kAtomic) {
    // A row of the pool for each class of several.
    for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < p.batch;
         i += blocks * kHashThreads) {
      if (index.GroupAt(i) == i && index.CountOf(i) > 1) {
        const int row = index.TakePoolRows(1);
        p.first_pool_row[i] = row;
        p.finite_count[row] = 0;
      }
    }
  }
  ArriveBlock(&counters.ranked_blocks.value);

  bool several = false;  // whether this warp has samples of classes with several
  for (int i = own; __any_sync(kAllLanes, i < p.batch); i += warps * kWarp) {
    const bool holds = i < p.batch;
    const int64_t label = holds ? p.Label(i) : 0;
    const int group = holds ? index.GroupAt(i) : -1;
    const bool alone = holds && (group < 0 || index.CountOf(group) == 1);
    several |= __any_sync(kAllLanes, holds && !alone);
    for (unsigned left = __ballot_sync(kAllLanes, alone); left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      rows.DoAlone(__shfl_sync(kAllLanes, i, lane), __shfl_sync(kAllLanes, label, lane));
    }
  }
  if (several) {
    WaitAsWarp(&counters.ranked_blocks.value, blocks);
    for (int i = own; __any_sync(kAllLanes, i < p.batch); i += warps * kWarp) {
      const int group = i < p.batch ? index.GroupAt(i) : -1;
      const int count = group < 0 ? 1 : index.CountOf(group);
      const bool has_piece = count > 1 && (kAtomic || index.HasPiece(i, group, count));
      for (unsigned left = __ballot_sync(kAllLanes, has_piece); left != 0; left &= left - 1) {
        const int lane = __ffs(static_cast<int>(left)) - 1;
        const int j = __shfl_sync(kAllLanes, i, lane);
        if constexpr (kAtomic) {
          rows.AddAtomically(j, p.Label(j), __shfl_sync(kAllLanes, group, lane),
                             __shfl_sync(kAllLanes, count, lane));
        } else {
          index.SetClass(j);
          rows.DoPiece(index);
        }
      }
    }
  }
  const double loss = rows.reduces_loss() ? SumOfUnits(p, shared) : 0;
  if (!IsLastBlock() || threadIdx.x != 0) return;
  if (rows.reduces_loss()) rows.StoreLossSum(loss);
  // All had read the parity when they arrived at counted_blocks. It is read again, since there is
  // no register to keep it in.
  const int own_parity = p.header->parity;
  p.header->slots[own_parity] = p.slots;
  p.header->groups[own_parity] = p.batch;
  p.header->parity = 1 - own_parity;
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

// The device's multiprocessors; remembered, because the question costs more than a launch.
cudaError_t Multiprocessors(int* count) {
  static thread_local int known_device = -1, known_count = 0;
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device != known_device) {
    const cudaError_t error =
        cudaDeviceGetAttribute(&known_count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    known_device = device;
  }
  *count = known_count;
  return cudaSuccess;
}

template <typename Kernel, typename Argument>
cudaError_t Launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, bool cooperative,
                   void* stream, const Argument& argument) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

int64_t Largest(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t Smallest(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

template <typename Feature, int Width>
cudaError_t LaunchStep(const Parameters<Feature>& p, void* stream) {
  int multiprocessors;
  if (const cudaError_t error = Multiprocessors(&multiprocessors); error != cudaSuccess) {
    return error;
  }
  if (p.batch <= kScanBatch && !p.cuda.atomic) {
    constexpr int kRows = kScanThreads / kWarp;
    const int64_t shared = Largest(ScanIndex<Feature>::SharedBytes(p.batch, kScanThreads),
                                   LossSumSharedBytes(kScanThreads));
    const int64_t blocks = Smallest(Quotient(p.batch, kRows), int64_t{8} * multiprocessors);
    return Launch(ScanStep<Feature, Width>, Largest(blocks, 1), kScanThreads, shared, false, stream,
                  p);
  }
  const int64_t shared =
      Largest(HashIndex<Feature>::SharedBytes(kHashThreads), LossSumSharedBytes(kHashThreads));
  constexpr int kRows = kHashThreads / kWarp;
  const int64_t blocks =
      Smallest(Quotient(p.batch, kRows), int64_t{kHashResident} * multiprocessors);
  const auto kernel =
      p.cuda.atomic ? HashStep<Feature, Width, true> : HashStep<Feature, Width, false>;
  return Launch(kernel, Largest(blocks, 1), kHashThreads, shared, true, stream, p);
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

int64_t CudaWorkspaceBytes(const CudaWorkspace& workspace) { return Layout(workspace).bytes; }

template <typename Feature, typename Label>
int CenterLossOnCuda(const StepArguments<Feature, Label>& step,
                     const CudaOptions<CenterType<Feature>>& options,
                     const CudaWorkspace& workspace, void* stream) {
  using Center = CenterType<Feature>;
  // Positions are ints, and so is a count of slots.
  constexpr int64_t kMostSamples = int64_t{1} << 28;
  if (step.batch > kMostSamples || step.batch > workspace.batch || step.dim > workspace.dim ||
      workspace.center_size != sizeof(Center) || options.atomic != workspace.atomic) {
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
  p.header = static_cast<Header*>(at(layout.header));
  for (int k = 0; k < 2; ++k) {
    p.table[k] = static_cast<int*>(at(layout.table[k]));
    p.groups[k] = static_cast<Group*>(at(layout.groups[k]));
  }
  p.slots = static_cast<int>(Layout::SlotsFor(step.batch));
  p.first_pool_row = static_cast<int*>(at(layout.first_pool_row));
  p.group_of = static_cast<int*>(at(layout.group_of));
  p.rank_in_tile = static_cast<int*>(at(layout.rank_in_tile));
  p.tile_count = static_cast<int*>(at(layout.tile_count));
  p.tile_start = static_cast<int*>(at(layout.tile_start));
  p.tile_order = static_cast<int*>(at(layout.tile_order));
  p.sample_loss = static_cast<Box<Center>*>(at(layout.sample_loss));
  p.unit_loss = static_cast<Box<double>*>(at(layout.unit_loss));
  p.pool_rows = layout.pool_rows;
  p.arrivals = static_cast<int*>(at(layout.arrivals));
  p.finite_count = static_cast<int*>(at(layout.finite_count));
  p.part_finite = static_cast<unsigned*>(at(layout.part_finite));
  p.part_squares = static_cast<Center*>(at(layout.part_squares));
  p.chunk_members = static_cast<int*>(at(layout.chunk_members));
  p.pool = static_cast<Center*>(at(layout.pool));

  // Whole vectors where every row starts on one.
  constexpr int kWidth = 16 / sizeof(Center);
  const bool aligned = step.dim % kWidth == 0 && Aligned(step.features) && Aligned(step.centers) &&
                       Aligned(step.residual);
  const int64_t unit = kWarp * (aligned ? kWidth : 1);  // a vector in each lane
  const int64_t units = Largest(Quotient(step.dim, unit), 1);
  p.part_columns = Quotient(units, Smallest(units, kParts)) * unit;
  p.parts = static_cast<int>(Largest(Quotient(step.dim, p.part_columns), 1));
  return aligned ? LaunchStep<Feature, kWidth>(p, stream) : LaunchStep<Feature, 1>(p, stream);
}

template <typename Feature>
int BackwardOnCuda(const CenterType<Feature>* upstream, bool per_sample,
                   const CenterType<Feature>* residual, Feature* gradient, int64_t batch,
                   int64_t dim, void* stream) {
  if (batch * dim == 0) return cudaSuccess;
  int multiprocessors;
  if (const cudaError_t error = Multiprocessors(&multiprocessors); error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(Smallest(Quotient(batch, 8), int64_t{8} * multiprocessors)));
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
