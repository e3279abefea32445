// The argument of the kernels, and the layout of the workspace.
//
// `Parameters` holds the caller's arrays, the options, and pointers into the workspace: the device
// memory for what the warps of a launch tell each other. `PlaceArrays` runs on the host and sets
// those pointers. A launch needs some of the arrays zero when it starts, and sets them back to zero
// before it ends; their comments say "zero between launches". It needs nothing of the others.

#ifndef TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_
#define TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/center_loss_cuda.h"
#include "cuda/device.cuh"

namespace tcl {
namespace {

// Samples of a chunk, one for each lane. A node of the reduction tree has as many children.
constexpr int kChunk = kWarp;

// A multi-chunk class of n > kChunk samples has ceil(n / kChunk) partial sums, at most n / 16.
constexpr int kSamplesPerPartialSum = kChunk / 2;

// Tiles of the batch. A lane reads four of their entries as one vector.
constexpr int kTiles = 4 * kWarp;
static_assert(kMostCudaSamples / kTiles < 1 << 16, "the samples of a tile are counted in 16 bits");

// Hash slots for each sample. A small batch gets more, because its time depends on the longest
// sequence of probes. With a large batch, more slots would cost more to clear than shorter
// sequences save.
constexpr int kSlotsPerSample = 8, kMaxSlotsPerSample = 16;
constexpr int64_t kManySlots = 1 << 17;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t HashSlots(int64_t batch) {
  int64_t slots = 1;
  while (slots < kSlotsPerSample * batch ||
         (slots < kMaxSlotsPerSample * batch && slots < kManySlots)) {
    slots *= 2;
  }
  return slots;
}

// Samples that a warp of the hash kernel takes with one ticket.
constexpr int kSamplesPerTicket = 2;

// Adjacent samples whose losses one block of the hash kernel adds up.
constexpr int kLossSegment = 4096;

// Counters of the hash kernel. Each has a cache line to itself (no false sharing), because blocks
// poll some of them while other blocks change others.
struct Counters {
  struct Counter {
    int value;
    int padding[31];
  };
  Counter labels_counted;       // grid barrier: all labels are in the hash table
  Counter centers_read;         // grid barrier: all samples have read their centers
  Counter large_classes;        // number of large classes
  Counter multi_chunk_classes;  // number of multi-chunk classes
  Counter chunks;               // number of chunks of large classes
  Counter partial_sums;         // number of rows of partial sums in use
  Counter counted;              // N, if there is an ignored class
  Counter tickets;              // number of tickets taken
};

// The counters, the hash table and `duplicates` exist twice: set 0 and set 1. Launches of the hash
// kernel use the two sets in turn, and each launch clears the set of the next launch, so no barrier
// has to separate clearing from use.
struct Header {
  Counters counters[2];
  int parity;      // index of the set that the next launch uses
  int slots[2];    // hash slots that the last launch with this set used, to be cleared
  int samples[2];  // batch size of that launch
};

template <typename Feature>
struct Parameters {
  using Center = CenterType<Feature>;

  // The caller's arguments, see StepArguments.
  int batch;
  int64_t dim;
  int64_t classes;
  const Feature* features;
  const void* labels;
  bool long_labels;  // int64 labels, otherwise int32
  const Center* sample_weight;
  Center* centers;
  Center* loss;
  Center* residual;
  Center* squared_distance;
  bool features_are_residuals;
  StepOptions<Center> options;
  CudaOptions<Center> cuda;
  CudaTuning tuning;

  // Hash kernel. Arrays [B] marked "owner" have an entry for each class, at its owner's position.
  Header* header;
  // Hash table, [slots]: lower half of a label in the upper half of the slot, position of its owner
  // + 1 in the lower half. 0: free. Zero between launches.
  unsigned long long* table[2];
  int* duplicates[2];  // [B] owner: number of other samples of the class. Zero between launches
  int slots;           // size of the hash table for this batch
  int* duplicate_positions;  // [B, kChunk] owner: positions of the first 31 duplicates inserted
  int* owner_of;             // [B] owner of the sample's class; -1: the sample moves no center
  int* multi_chunk_index;    // [B] owner: index of the multi-chunk class
  // [multi-chunk classes, kTiles] the range of the class in the tile: number of samples in the
  // upper half, their first place in the lower half.
  unsigned* tile_ranges;
  // [B] positions of the samples of multi-chunk classes, each at its place in its tile: a tile is
  // sorted by owner, then by position. The entries of other samples are not written.
  int* tile_order;
  int* first_chunk;        // [B] owner: index in owner_of_chunk of the first chunk of a large class
  int* first_partial_sum;  // [B] owner: row of the first partial sum
  int* owner_of_chunk;     // [chunks]
  int* non_finite;         // [B] owner: number of samples of the class with non-finite features

  int64_t partial_sum_rows;
  Center* partial_sums;      // [partial_sum_rows, D]; with `atomic` zero between launches
  Arrivals* arrivals;        // [levels, partial_sum_rows, slices]. Zero between launches
  Arrivals* chunk_arrivals;  // [B] scan kernel. Zero between launches

  Mailbox<Center>* sample_loss;   // [B]. Zero between launches
  Mailbox<double>* segment_loss;  // [ceil(B / kLossSegment)]. Zero between launches

  __device__ int64_t Label(int i) const {
    return long_labels ? static_cast<const int64_t*>(labels)[i]
                       : static_cast<const int32_t*>(labels)[i];
  }
  __device__ bool Ignored(int64_t label) const {
    return options.has_ignore_class && label == options.ignore_class;
  }
  __device__ bool InTable(int64_t label) const { return label >= 0 && label < classes; }
  __device__ const Feature* Features(int i) const { return features + int64_t{i} * dim; }
  __device__ Center* CenterRow(int64_t label) const { return centers + label * dim; }
  __device__ Center* PartialSum(int row) const { return partial_sums + int64_t{row} * dim; }
  // Samples of a tile: a multiple of four, so that every tile of `owner_of` is whole vectors.
  __device__ int TileSize() const { return (batch + 4 * kTiles - 1) / (4 * kTiles) * 4; }

  // Records the time at which this block passes a point of the launch (phase clock).
  __device__ void Stamp(int phase) const {
    if (cuda.clock == nullptr || threadIdx.x != 0) return;
    cuda.clock[int64_t{blockIdx.x} * kCudaPhases + phase] = Nanoseconds();
  }
};

struct WorkspaceBytes {
  int64_t all = 0;
  int64_t clear = 0;  // the first bytes, which a launch on a fresh workspace needs zero
};

// Sets the pointers of `p` into the workspace. Every array starts on a cache line of its own.
template <typename Feature>
WorkspaceBytes PlaceArrays(const CudaWorkspace& workspace, Parameters<Feature>* p) {
  const int64_t batch = workspace.batch, slots = HashSlots(batch);
  int64_t levels = 1;  // of the reduction tree
  for (int64_t covered = kChunk * kChunk; covered < batch; covered *= kChunk) ++levels;
  p->partial_sum_rows = batch / (workspace.atomic ? 2 : kSamplesPerPartialSum) + 1;
  const int64_t max_slices = CeilDiv(workspace.dim, kWarp);  // Width 1

  WorkspaceBytes bytes;
  const auto place = [&](auto*& array, int64_t count) {
    using Array = std::remove_reference_t<decltype(array)>;
    array = reinterpret_cast<Array>(reinterpret_cast<uintptr_t>(workspace.memory) + bytes.all);
    bytes.all += CeilDiv(count * static_cast<int64_t>(sizeof(*array)), 256) * 256;
  };
  place(p->header, 1);
  place(p->table[0], slots);
  place(p->duplicates[0], batch);
  place(p->arrivals, levels * p->partial_sum_rows * max_slices);
  place(p->chunk_arrivals, batch);
  place(p->sample_loss, batch);
  place(p->segment_loss, batch / kLossSegment + 1);
  bytes.clear = bytes.all;
  place(p->table[1], slots);
  place(p->duplicates[1], batch);
  place(p->duplicate_positions, batch * kChunk);
  place(p->owner_of, batch);
  place(p->multi_chunk_index, batch);
  place(p->tile_ranges, (batch / kChunk + 1) * kTiles);
  place(p->tile_order, batch);
  place(p->first_chunk, batch);
  place(p->first_partial_sum, batch);
  place(p->owner_of_chunk, batch / 3 + 1);
  place(p->non_finite, batch);
  place(p->partial_sums, p->partial_sum_rows * workspace.dim);
  if (workspace.atomic) bytes.clear = bytes.all;  // atomic sums start from zero
  return bytes;
}

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_
