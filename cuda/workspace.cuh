// What a launch is given, and where its bookkeeping lies in device memory.

#ifndef TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_
#define TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_

#include <cstdint>

#include "cuda/center_loss_cuda.h"
#include "cuda/device.cuh"

namespace tcl {
namespace {

// Members of a chunk, and chunks below a node of the tree. The sum of a chunk is written and read
// again: of 16 members that is an eighth of the traffic of their features. Of many more, the launch
// would wait for a few warps in the end.
constexpr int kMembers = 16;

// A class of up to so many samples is done by one warp by whole rows, one after the other.
constexpr int kWholeMembers = kMembers / 2;

// Parts that the chunks of a larger class are cut into by columns, at most. Each keeps the squares
// of its members: of 4 parts 16 bytes for each sample.
constexpr int kParts = 4;

// Who arrives at the counters of a row of the pool.
enum ArrivalLevel {
  kAtChunk = 0,          // the parts of a chunk
  kAtPart = 1,           // of each part, the chunks of a node
  kAtNode = 1 + kParts,  // the parts of a node
  kAtNextNode            // the nodes below a node, level after level
};

// As many as a warp has lanes: a lane for each tile.
constexpr int kTiles = kWarp;

// Table slots for each sample: at most a quarter full, so that few probes go astray.
constexpr int64_t kSlotsPerSample = 4;

// Of a hashed launch.
struct Counters {
  // On a cache line of its own: others wait for one while others yet add to another.
  struct Counter {
    int value;
    int padding[31];
  };
  Counter counted_blocks;  // blocks that have counted their labels
  Counter ranked_blocks;   // blocks that have ranked their tiles
  Counter pool_rows;       // rows of the pool that are taken
  Counter counted;         // N, with an ignore label
};

// What hashed launches leave to one another: each uses one of two sets of counters and tables, and
// clears the other, which nobody uses any more.
struct Header {
  Counters counters[2];
  int parity;     // of the next launch
  int slots[2];   // slots of each table that its last launch used
  int groups[2];  // and groups
};

// Neighbouring samples whose losses one block of a hashed launch adds up: eight for each thread.
constexpr int kLossUnit = 2048;

// A class of the batch, under the position of the sample that entered it into the table.
struct Group {
  int count;       // n, with the samples that are not finite
  unsigned tiles;  // which tiles hold samples of it
};

struct Layout {
  int levels = 1;         // of the tree, above the chunks
  int64_t slots = 0;      // of each table
  int64_t pool_rows = 0;  // of sums
  int64_t bytes = 0;

  int64_t header, table[2], groups[2], first_pool_row, group_of, rank_in_tile, tile_count,
      tile_start, tile_order, sample_loss, unit_loss, arrivals, finite_count, part_finite,
      part_squares, chunk_members, pool;

  explicit Layout(const CudaWorkspace& workspace) {
    const int64_t batch = workspace.batch;
    slots = SlotsFor(batch);
    for (int64_t covered = kMembers; covered < batch; covered *= kMembers) ++levels;
    // A class of n > kWholeMembers samples has ceil(n / kMembers) <= floor(n / kWholeMembers)
    // chunks.
    pool_rows = workspace.atomic ? batch / 2 + 1 : batch / kWholeMembers + 1;
    header = Take(sizeof(Header));
    for (int k = 0; k < 2; ++k) table[k] = Take(slots * static_cast<int64_t>(sizeof(int)));
    for (int k = 0; k < 2; ++k) groups[k] = Take(batch * static_cast<int64_t>(sizeof(Group)));
    first_pool_row = Take(batch * static_cast<int64_t>(sizeof(int)));
    group_of = Take(batch * static_cast<int64_t>(sizeof(int)));
    rank_in_tile = Take(batch * static_cast<int64_t>(sizeof(int)));
    tile_count = Take(batch * kTiles * static_cast<int64_t>(sizeof(int)));
    tile_start = Take(batch * kTiles * static_cast<int64_t>(sizeof(int)));
    tile_order = Take(batch * static_cast<int64_t>(sizeof(int)));
    sample_loss = Take(batch * 2 * workspace.center_size);
    unit_loss = Take((batch / kLossUnit + 1) * static_cast<int64_t>(sizeof(Box<double>)));
    arrivals = Take((1 + kParts + levels) * pool_rows * static_cast<int64_t>(sizeof(int)));
    finite_count = Take(pool_rows * static_cast<int64_t>(sizeof(int)));
    part_finite = Take(kParts * pool_rows * static_cast<int64_t>(sizeof(unsigned)));
    part_squares = Take(kParts * batch * workspace.center_size);
    chunk_members = Take(kMembers * pool_rows * static_cast<int64_t>(sizeof(int)));
    pool = Take(pool_rows * workspace.dim * workspace.center_size);
  }

  static int64_t SlotsFor(int64_t batch) {
    int64_t slots = 1;
    while (slots < kSlotsPerSample * batch) slots *= 2;
    return slots;
  }

 private:
  int64_t Take(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 255) / 256 * 256;  // on cache lines of its own
    return at;
  }
};

// What a launch is given.
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

  Header* header;
  int* table[2];
  Group* groups[2];
  int slots;            // of the table, for this batch
  int* first_pool_row;  // [B] of a group
  int* group_of;        // [B]
  int* rank_in_tile;    // [B]
  int* tile_count;      // [B, kTiles] samples of a group in a tile
  int* tile_start;      // [B, kTiles] where they start in the tile's part of tile_order
  int* tile_order;      // [B] each tile's samples, those of one group together, in order

  // Empty but while a launch runs.
  Box<Center>* sample_loss;  // [B]
  Box<double>* unit_loss;    // [B / kLossUnit], rounded up

  // A row of the pool is the sum of a chunk, and then of the nodes of the tree whose first it is.
  int64_t pool_rows;
  int* arrivals;          // [1 + kParts + levels, pool_rows] how many have, see ArrivalLevel
  int* finite_count;      // [pool_rows] samples in the sum of a node
  unsigned* part_finite;  // [pool_rows, kParts] which members are finite in the part's columns
  Center* part_squares;   // [kParts, B] ||d||^2 of the part's columns
  int* chunk_members;     // [pool_rows, kMembers] positions in the batch
  Center* pool;           // [pool_rows, D]

  int parts;             // that a chunk is cut into
  int64_t part_columns;  // of each but the last

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
  __device__ Center* PoolAt(int row) const { return pool + int64_t{row} * dim; }
  __device__ int TileSize() const { return (batch + kTiles - 1) / kTiles; }
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_WORKSPACE_CUH_
