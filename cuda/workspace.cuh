// What a launch is given, and where its bookkeeping lies in device memory.

#ifndef TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_
#define TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_

#include <cstdint>

#include "cuda/center_loss_cuda.h"
#include "cuda/device.cuh"

namespace tcl {
namespace {

// Samples of a class that one warp does side by side.
constexpr int kChunk = 8;

// A class of up to so many samples is light: one warp does all of it, chunk after chunk, and a hashed
// launch needs no ranks for it. The owner of the class is one, the others have a list.
constexpr int kLight = 2 * kChunk;

// A heavy class has a partial sum for each chunk: at most one for so many of its samples.
constexpr int kSamplesPerPoolRow = 5;
static_assert((kLight + kChunk) / kChunk <= (kLight + 1) / kSamplesPerPoolRow, "rows for each chunk");

// Tiles of the batch for the ranks of heavy classes, four for each lane.
constexpr int kTiles = 4 * kWarp;

// Hash slots for each sample. A small batch, which waits for its longest chain of probes, has more.
constexpr int kSlotsPerSample = 4, kMostSlotsPerSample = 16;
constexpr int64_t kManySlots = 1 << 17;

// Neighboring samples whose losses one block of a hashed launch adds up.
constexpr int kLossUnit = 4096;

// Of a hashed launch. Each is on a cache line of its own: some are polled while others change.
struct Counters {
  struct Counter {
    int value;
    int padding[31];
  };
  Counter counted_blocks;  // grid barrier: blocks that have counted their labels
  Counter ranked_blocks;   // grid barrier: blocks that have ranked the samples of heavy classes
  Counter heavy_classes;   // how many classes are heavy
  Counter pool_rows;       // rows of the pool that are taken
  Counter counted;         // N, with an ignore label
};

// Hashed launches use two sets of counters, hash table and class counts by turns: each launch clears
// the set of the next one, which no thread uses any more.
struct Header {
  Counters counters[2];
  int parity;      // the set of the next launch
  int slots[2];    // hash slots that the last launch with this set used
  int samples[2];  // and samples
};

struct Layout {
  int levels = 0;         // of the reduction tree
  int64_t slots = 0;      // of each hash table
  int64_t pool_rows = 0;  // partial sums
  int64_t bytes = 0;

  int64_t header, table[2], others[2], members, owner_of, heavy_class, tile_part, tile_order,
      first_pool_row, class_of_row, finite_count, arrivals, sample_loss, unit_loss, pool;

  explicit Layout(const CudaWorkspace& workspace) {
    const CudaTuning& tuning = workspace.tuning;
    const int64_t batch = workspace.batch;
    constexpr int64_t kInt = sizeof(int);
    slots = SlotsFor(batch);
    for (int64_t covered = kChunk; covered < batch; covered *= tuning.fan_in) ++levels;
    pool_rows = batch / (workspace.atomic ? 2 : kSamplesPerPoolRow) + 1;
    header = Take(sizeof(Header));
    for (int k = 0; k < 2; ++k) table[k] = Take(slots * static_cast<int64_t>(sizeof(uint64_t)));
    for (int k = 0; k < 2; ++k) others[k] = Take(batch * kInt);
    members = Take(batch * kLight * kInt);
    owner_of = Take(batch * kInt);
    heavy_class = Take(batch * kInt);
    tile_part = Take((batch / kLight + 1) * kTiles * kInt);
    tile_order = Take(batch * kInt);
    first_pool_row = Take(batch * kInt);
    class_of_row = Take(pool_rows * kInt);
    finite_count = Take(pool_rows * kInt);
    arrivals = Take((levels + 1) * pool_rows * kInt);
    sample_loss = Take(batch * 2 * workspace.center_size);
    unit_loss = Take((batch / kLossUnit + 1) * static_cast<int64_t>(sizeof(Mailbox<double>)));
    pool = Take(pool_rows * workspace.dim * workspace.center_size);
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
  // [slots] the lower half of a label, and in the lower half the position of its owner, plus one; 0:
  // free. Zero.
  unsigned long long* table[2];
  int* others[2];       // [B] of an owner: samples of its class beside it. Zero
  int slots;            // of the table, for this batch
  int* members;         // [B, kLight] of an owner: positions of the first others to arrive
  int* owner_of;        // [B] the owner of the sample's class, -1: of no class
  int* heavy_class;     // [B] of the owner of a heavy class: its number among them
  // [heavy classes, kTiles] of the samples of a class in a tile: where they begin in the tile's part
  // of tile_order, and in the upper half how many there are.
  unsigned* tile_part;
  int* tile_order;      // [B] each tile's samples, by class and then by position
  int* first_pool_row;  // [B] of an owner
  int* class_of_row;    // [pool_rows] the owner of the class whose chunk the row is

  // A row of the pool is the sum of a chunk, and then of the nodes of the tree that begin with it.
  int64_t pool_rows;
  Center* pool;       // [pool_rows, D]
  int* finite_count;  // [pool_rows] samples in that sum
  int* arrivals;      // [levels, pool_rows] children of a node that have arrived. Zero

  Mailbox<Center>* sample_loss;  // [B]. Zero
  Mailbox<double>* unit_loss;    // [B / kLossUnit], rounded up. Zero

  __device__ int64_t Label(int i) const {
    return long_labels ? static_cast<const int64_t*>(labels)[i]
                       : static_cast<const int32_t*>(labels)[i];
  }
  __device__ bool Ignored(int64_t label) const {
    return options.has_ignore_label && label == options.ignore_label;
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
