// What a launch is given, and where its bookkeeping lies in device memory.

#ifndef TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_
#define TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_

#include <cstdint>

#include "cuda/center_loss_cuda.h"
#include "cuda/device.cuh"

namespace tcl {
namespace {

// A class of several chunks is heavy. A chunk is as many samples as a warp has lanes; so are the
// partial sums below a node of the reduction tree.
constexpr int kChunk = kWarp;

// A heavy class has a partial sum, a row of the pool, for each chunk: at most one for so many
// samples.
constexpr int kSamplesPerPoolRow = kChunk / 2;

// Tiles of the batch for the ranks of heavy classes, four for each lane.
constexpr int kTiles = 4 * kWarp;
static_assert(kMostCudaSamples / kTiles < 1 << 16, "numbers of samples of a tile fit into 16 bits");

// Hash slots for each sample. A small batch, which waits for its longest chain of probes, has more.
constexpr int kSlotsPerSample = 8, kMostSlotsPerSample = 16;
constexpr int64_t kManySlots = 1 << 17;

// Samples that a warp takes at a time, once it has done its own share of a large batch.
constexpr int kGroup = 2;

// Neighboring samples whose losses one block of a hashed launch adds up.
constexpr int kLossUnit = 4096;

// Of a hashed launch. Each is on a cache line of its own: some are polled while others change.
struct Counters {
  struct Counter {
    int value;
    int padding[31];
  };
  Counter counted_blocks;  // grid barrier: blocks that have counted their labels
  Counter done_blocks;     // grid barrier: blocks whose samples have read their centers
  Counter large_classes;   // classes of three samples or more
  Counter heavy_classes;   // classes of several chunks
  Counter chunks;          // of all large classes
  Counter pool_rows;       // rows of the pool that are taken
  Counter counted;         // N, with an ignored class
  Counter tickets;         // groups of samples that warps have taken
};

// Hashed launches use two sets of counters, hash table and class counts by turns: each launch
// clears the set of the next one, which no thread uses any more.
struct Header {
  Counters counters[2];
  int parity;      // the set of the next launch
  int slots[2];    // hash slots that the last launch with this set used
  int samples[2];  // and samples
};

struct Layout {
  int levels = 1;         // of the reduction tree
  int64_t slots = 0;      // of each hash table
  int64_t pool_rows = 0;  // partial sums
  int64_t bytes = 0;
  int64_t clear_bytes = 0;  // of them that a launch on a fresh workspace needs zero

  int64_t header, table[2], others[2], members, owner_of, heavy_class, tile_part, tile_order,
      first_chunk, first_pool_row, class_of_chunk, not_finite, arrivals, chunk_arrivals,
      sample_loss, unit_loss, pool;

  explicit Layout(const CudaWorkspace& workspace) {
    const int64_t batch = workspace.batch;
    constexpr int64_t kInt = sizeof(int);
    slots = SlotsFor(batch);
    for (int64_t covered = kChunk * kChunk; covered < batch; covered *= kChunk) ++levels;
    pool_rows = batch / (workspace.atomic ? 2 : kSamplesPerPoolRow) + 1;
    constexpr int64_t kSlot = sizeof(uint64_t), kArrivals = sizeof(Arrivals);
    // What one launch needs zero comes first, see CudaWorkspaceClearBytes.
    header = Take(sizeof(Header));
    table[0] = Take(slots * kSlot);
    others[0] = Take(batch * kInt);
    // A slice of the narrowest kind has a warp's width of single numbers.
    arrivals = Take(levels * pool_rows * ((workspace.dim + kWarp - 1) / kWarp) * kArrivals);
    chunk_arrivals = Take(batch * kArrivals);
    sample_loss = Take(batch * 2 * workspace.center_size);
    unit_loss = Take((batch / kLossUnit + 1) * static_cast<int64_t>(sizeof(Mailbox<double>)));
    clear_bytes = bytes;
    table[1] = Take(slots * kSlot);
    others[1] = Take(batch * kInt);
    members = Take(batch * kChunk * kInt);
    owner_of = Take(batch * kInt);
    heavy_class = Take(batch * kInt);
    tile_part = Take((batch / kChunk + 1) * kTiles * kInt);
    tile_order = Take(batch * kInt);
    first_chunk = Take(batch * kInt);
    first_pool_row = Take(batch * kInt);
    class_of_chunk = Take((batch / 3 + 1) * kInt);
    not_finite = Take(batch * kInt);
    pool = Take(pool_rows * workspace.dim * workspace.center_size);
    if (workspace.atomic) clear_bytes = bytes;  // sums start from zero
  }

  static int64_t SlotsFor(int64_t batch) {
    int64_t slots = 1;
    while (slots < kSlotsPerSample * batch ||
           (slots < kMostSlotsPerSample * batch && slots < kManySlots)) {
      slots *= 2;
    }
    return slots;
  }

 private:
  int64_t Take(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 255) / 256 * 256;  // starts on a cache line of its own
    return at;
  }
};

// What a launch is given. Arrays of the workspace are written by one launch and read by the same
// one, except for those that have to be zero in between, which say so.
template <typename Feature>
struct Parameters {
  using Center = CenterType<Feature>;

  int batch;
  int64_t dim;
  int64_t classes;
  const Feature* features;
  const void* labels;
  bool long_labels;
  const Center* sample_weight;
  Center* centers;
  Center* loss;
  Center* residual;
  Center* squared_distance;
  bool features_are_residuals;
  StepOptions<Center> options;
  CudaOptions<Center> cuda;
  CudaTuning tuning;

  // Of hashed launches.
  Header* header;
  // [slots] the lower half of a label, and in the lower half the position of its owner, plus one;
  // 0: free. Zero.
  unsigned long long* table[2];
  int* others[2];    // [B] of an owner: samples of its class beside it. Zero
  int slots;         // of the table, for this batch
  int* members;      // [B, kChunk] of an owner: positions of the first others to arrive
  int* owner_of;     // [B] the owner of the sample's class, -1: of no class
  int* heavy_class;  // [B] of the owner of a heavy class: its number among them
  // [heavy classes, kTiles] of the samples of a class in a tile: where they begin in the tile's
  // part of tile_order, and in the upper half how many there are.
  unsigned* tile_part;
  int* tile_order;      // [B] each tile's samples, by class and then by position
  int* first_chunk;     // [B] of the owner of a large class: its first place in class_of_chunk
  int* first_pool_row;  // [B] of the owner of a heavy class, or of any with `atomic`
  int* class_of_chunk;  // [chunks] the owner of the class
  int* not_finite;      // [B] of an owner: samples of its class that are not finite

  int64_t pool_rows;
  Center* pool;              // [pool_rows, D] partial sums
  Arrivals* arrivals;        // [levels, pool_rows, slices] at the nodes of the tree. Zero
  Arrivals* chunk_arrivals;  // [B] of a scanned launch: at the chunks. Zero

  Mailbox<Center>* sample_loss;  // [B]. Zero
  Mailbox<double>* unit_loss;    // [B / kLossUnit], rounded up. Zero

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
  __device__ Center* PoolRow(int row) const { return pool + int64_t{row} * dim; }
  // Samples of a tile: a multiple of four, so that it begins on a vector of four ints.
  __device__ int TileSize() const { return (batch + 4 * kTiles - 1) / (4 * kTiles) * 4; }

  // Notes the time at which this block passes a point of the launch.
  __device__ void Stamp(int phase) const {
    if (cuda.clock == nullptr || threadIdx.x != 0) return;
    cuda.clock[int64_t{blockIdx.x} * kCudaPhases + phase] = Nanoseconds();
  }
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_
