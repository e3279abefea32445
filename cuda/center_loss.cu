// The center loss step on a GPU, in one launch.
//
// Work. A *chunk* is up to kMembers samples of one class, of consecutive ranks in batch order; the
// sample whose rank is a multiple of kMembers leads it, and its warp does it: center and features
// are read once, the residuals written, the sum of the residuals kept in registers. A class of one
// chunk (nearly all, with many labels) moves its center at once: nobody else reads or writes that
// row, so no residual can see it moved. The chunks of a larger class leave their sums in a pool;
// the last of kMembers neighbours to arrive adds theirs up in order, and so on up a tree, whose
// root moves the center. By then every chunk has read it.
//
// How a sample learns the count and its rank among the samples of its class:
//   ScanIndex  (B <= kScanBatch): each warp scans the labels in shared memory. No barrier.
//   HashIndex  (larger B): all blocks count the labels in a hash table; a barrier, behind which the
//     samples whose label is alone are done; meanwhile kTiles blocks rank the others, each those of
//     one tile of the batch; a second barrier, behind which those are done.
// Barriers need all blocks resident: the launch is cooperative.
//
// Bytes moved, all labels distinct: B D (features + center read + center written + residual).
//
// Deterministic: ranks, chunks and the tree follow from the labels alone, and the loss is summed in
// batch order by the last block. With `atomic`, each sample of a class of several adds its residual
// to one row of the pool in whatever order, and the last of them moves the center.

#include "csrc/center_loss_math.h"
#include "cuda/center_loss_cuda.h"
#include "cuda/device.cuh"

namespace tcl {
namespace {

// Members of a chunk, and chunks below a node of the tree. A chunk's sum is written and read again:
// with 16 that adds an eighth to the traffic of its features. It takes some 16 round trips to
// memory, which is what one row in a hundred thousand, and any row in a batch of thousands, may
// take without being the last to finish.
constexpr int kMembers = 16;

// Up to here a scan of the labels by every warp (B / 32 steps) is cheaper than two barriers.
constexpr int64_t kScanBatch = 2048;
constexpr int kScanThreads = 128;  // small, to spread a small batch over all multiprocessors
// Blocks on a multiprocessor: 128 registers a thread, 168 where they hold pairs.
template <typename Center>
constexpr int kScanResident = sizeof(Center) == 8 ? 3 : 4;
constexpr int kHashThreads = 256;
constexpr int kHashResident = 2;  // blocks on a multiprocessor, for certain

// As many as a warp has lanes: a lane for each tile.
constexpr int kTiles = kWarp;

// Table slots for each sample: at most a quarter full, so that few probes go astray.
constexpr int64_t kSlotsPerSample = 4;

// Bookkeeping of the launch that is running. All zero between launches but for `parity`, `slots`
// and `groups`.
struct Header {
  int done;            // blocks that have finished
  int counted_blocks;  // blocks that have counted their labels
  int ranked_blocks;   // blocks that have ranked their tiles
  int pool_rows;       // rows of the pool that are taken
  int counted;         // N
  int parity;          // which of the two tables this launch uses; it clears the other
  int slots[2];        // slots of each table that its last launch used
  int groups[2];       // and groups
};

// A class of the batch, under the position of the sample that entered it into the table.
struct Group {
  int count;       // n, with the samples that are not finite
  unsigned tiles;  // which tiles hold samples of it
};

// A row of the pool: the sum of a chunk, or of a node of the tree.
struct PoolRow {
  int row;    // where
  int count;  // of how many finite samples
};

struct Layout {
  int levels = 1;         // of the tree
  int64_t slots = 0;      // of each table
  int64_t pool_rows = 0;  // of sums
  int64_t bytes = 0;

  int64_t header, table[2], groups[2], arrivals, sums_by_leader, group_of, rank_in_tile, tile_count,
      tile_start, tile_order, sample_loss, pool;

  explicit Layout(const CudaWorkspace& workspace) {
    const int64_t batch = workspace.batch;
    slots = SlotsFor(batch);
    for (int64_t covered = kMembers; covered < batch; covered *= kMembers) ++levels;
    // A class of n > kMembers samples has ceil(n / kMembers) <= 2 n / (kMembers + 1) chunks.
    pool_rows = workspace.atomic ? batch / 2 + 1 : batch / 8 + 1;
    static_assert(kMembers >= 15, "2 / (kMembers + 1) <= 1 / 8");
    header = Take(sizeof(Header));
    for (int k = 0; k < 2; ++k) table[k] = Take(slots * static_cast<int64_t>(sizeof(int)));
    for (int k = 0; k < 2; ++k) groups[k] = Take(batch * static_cast<int64_t>(sizeof(Group)));
    arrivals = Take(levels * batch * static_cast<int64_t>(sizeof(int)));
    sums_by_leader = Take(batch * static_cast<int64_t>(sizeof(PoolRow)));
    group_of = Take(batch * static_cast<int64_t>(sizeof(int)));
    rank_in_tile = Take(batch * static_cast<int64_t>(sizeof(int)));
    tile_count = Take(batch * kTiles * static_cast<int64_t>(sizeof(int)));
    tile_start = Take(batch * kTiles * static_cast<int64_t>(sizeof(int)));
    tile_order = Take(batch * static_cast<int64_t>(sizeof(int)));
    sample_loss = Take(batch * workspace.center_size);
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
  int slots;      // of the table, for this batch
  int* arrivals;  // [levels, B] chunks and nodes that have arrived, under their first leader
  PoolRow* sums_by_leader;  // [B]
  int* group_of;            // [B]
  int* rank_in_tile;        // [B]
  int* tile_count;          // [B, kTiles] samples of a group in a tile
  int* tile_start;          // [B, kTiles] where they start in the tile's part of tile_order
  int* tile_order;          // [B] each tile's samples, those of one group together, in order
  Center* sample_loss;      // [B]
  Center* pool;             // [pool_rows, D]

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

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int WarpOfBlock() { return static_cast<int>(threadIdx.x) / kWarp; }

// Up to kWarp of a class's samples, one in each lane: of the ranks first, first + stride, ...
struct Members {
  int count;     // lanes that hold one
  int position;  // in the batch
};

// Ranks by scanning the labels, which lie in shared memory.
template <typename Feature>
class ScanIndex {
 public:
  __device__ ScanIndex(const Parameters<Feature>& p, unsigned char* shared)
      : p_(p), labels_(reinterpret_cast<int64_t*>(shared)) {
    found_ = reinterpret_cast<int*>(labels_ + p.batch) + WarpOfBlock() * kWarp;
    for (int i = static_cast<int>(threadIdx.x); i < p.batch; i += static_cast<int>(blockDim.x)) {
      labels_[i] = p.Label(i);
    }
    __syncthreads();
  }

  static int64_t SharedBytes(int64_t batch) {
    return batch * static_cast<int64_t>(sizeof(int64_t)) +
           kScanThreads * static_cast<int64_t>(sizeof(int));
  }

  __device__ int Counted() const {
    if (!p_.options.has_ignore_label) return p_.batch;
    int counted = 0;
    for (int i = Lane(); i < p_.batch; i += kWarp) counted += !p_.Ignored(labels_[i]);
    return WarpSum(counted);
  }

  // The class of sample i from here on, its count and the rank of i.
  __device__ void SetClass(int i) {
    label_ = labels_[i];
    count_ = rank_ = 0;
    for (int start = 0; start < p_.batch; start += kWarp) {
      const int j = start + Lane();
      const bool same = j < p_.batch && labels_[j] == label_;
      count_ += __popc(__ballot_sync(kAllLanes, same));
      rank_ += __popc(__ballot_sync(kAllLanes, same && j < i));
    }
  }

  __device__ int count() const { return count_; }
  __device__ int rank() const { return rank_; }

  __device__ Members Find(int first, int stride, int most) {
    int before = 0;
    const int last = first + stride * (most - 1);
    for (int start = 0; start < p_.batch && before <= last; start += kWarp) {
      const int j = start + Lane();
      const bool same = j < p_.batch && labels_[j] == label_;
      const unsigned all = __ballot_sync(kAllLanes, same);
      const int rank = before + __popc(all & ((1u << Lane()) - 1));
      if (same && rank >= first && rank <= last && (rank - first) % stride == 0) {
        found_[(rank - first) / stride] = j;
      }
      before += __popc(all);
    }
    __syncwarp();
    const Members members = {most, Lane() < most ? found_[Lane()] : 0};
    __syncwarp();
    return members;
  }

 private:
  const Parameters<Feature>& p_;
  int64_t* labels_;  // [B]
  int* found_;       // [kWarp]
  int64_t label_ = 0;
  int count_ = 0;
  int rank_ = 0;
};

// Ranks from a hash table of the batch's labels and from the counts of each class in each tile.
template <typename Feature>
class HashIndex {
 public:
  __device__ HashIndex(const Parameters<Feature>& p, int parity)
      : p_(p), table_(p.table[parity]), groups_(p.groups[parity]) {}

  // Enters this block's share of the labels, once for each warp and label.
  __device__ void Enter() {
    int counted = 0;
    const int threads = static_cast<int>(gridDim.x * blockDim.x);
    const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    for (int start = thread - Lane(); start < p_.batch; start += threads) {
      const int i = start + Lane();
      const int64_t label = i < p_.batch ? p_.Label(i) : -1;
      const bool is_counted = i < p_.batch && !p_.Ignored(label);
      const bool enters = is_counted && p_.InTable(label);
      counted += is_counted;
      const unsigned same = __match_any_sync(kAllLanes, enters ? label : -1 - Lane());
      const int leader = __ffs(static_cast<int>(same)) - 1;
      int group = -1;
      if (enters && leader == Lane()) {
        group = GroupOf(label, i);
        atomicAdd(&groups_[group].count, __popc(same));
      }
      group = __shfl_sync(kAllLanes, group, leader);
      if (i < p_.batch) p_.group_of[i] = group;
    }
    counted = WarpSum(counted);
    if (Lane() == 0 && counted > 0) atomicAdd(&p_.header->counted, counted);
  }

  // For each tile of this block's share: the order of its samples of classes with several, and
  // their ranks among the tile's.
  __device__ void RankTiles(int* shared) {
    for (int tile = static_cast<int>(blockIdx.x); tile < kTiles;
         tile += static_cast<int>(gridDim.x)) {
      RankTile(tile, shared);
    }
  }

  // A group is known by the position of the sample that entered it.
  __device__ int GroupAt(int i) const { return __ldcg(&p_.group_of[i]); }
  __device__ int CountOf(int group) const { return __ldcg(&groups_[group].count); }

  // Whether sample i, of a group of several, leads a chunk. Each lane asks for a sample of its own.
  __device__ bool Leads(int i, int group) const {
    const unsigned tiles = __ldcg(&groups_[group].tiles);
    const int own = i / p_.TileSize();
    int rank = __ldcg(&p_.rank_in_tile[i]);
    for (int tile = 0; tile < own; ++tile) {
      if (tiles >> tile & 1) rank += __ldcg(&p_.tile_count[int64_t{group} * kTiles + tile]);
    }
    return rank % kMembers == 0;
  }

  __device__ void SetClass(int i) {
    const int group = GroupAt(i);
    count_ = CountOf(group);
    const unsigned tiles = __ldcg(&groups_[group].tiles);
    const int64_t at = int64_t{group} * kTiles + Lane();
    const bool here = tiles >> Lane() & 1;
    tile_count_ = here ? __ldcg(&p_.tile_count[at]) : 0;
    tile_start_ = here ? __ldcg(&p_.tile_start[at]) : 0;
    tile_rank_ = WarpSumBefore(tile_count_);
    rank_ = __shfl_sync(kAllLanes, tile_rank_, i / p_.TileSize()) + __ldcg(&p_.rank_in_tile[i]);
  }

  __device__ int count() const { return count_; }
  __device__ int rank() const { return rank_; }

  __device__ Members Find(int first, int stride, int most) const {
    const int rank = Lane() < most ? first + stride * Lane() : -1;
    int at = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int start = __shfl_sync(kAllLanes, tile_start_, tile);
      const int begin = __shfl_sync(kAllLanes, tile_rank_, tile);
      const int count = __shfl_sync(kAllLanes, tile_count_, tile);
      if (rank >= begin && rank < begin + count) {
        at = tile * p_.TileSize() + start + rank - begin;
      }
    }
    return {most, Lane() < most ? __ldcg(&p_.tile_order[at]) : 0};
  }

  // Clears this block's share of the table that the next launch uses.
  __device__ static void Clear(const Parameters<Feature>& p, int parity) {
    const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const int threads = static_cast<int>(gridDim.x * blockDim.x);
    const int slots = __ldcg(&p.header->slots[parity]);
    const int groups = __ldcg(&p.header->groups[parity]);
    for (int k = thread; k < slots; k += threads) p.table[parity][k] = 0;
    for (int k = thread; k < groups; k += threads) p.groups[parity][k] = Group{0, 0};
  }

 private:
  // Finds the group of the label, or makes i its name.
  __device__ int GroupOf(int64_t label, int i) {
    // The high bits of label * 2^64 / golden ratio: labels that share a stride spread, too.
    const uint64_t hash = static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u;
    int slot = static_cast<int>((hash >> 32) * static_cast<uint64_t>(p_.slots) >> 32);
    for (;;) {
      int entered = __ldcg(&table_[slot]);
      if (entered == 0) entered = atomicCAS(&table_[slot], 0, i + 1);
      if (entered == 0) return i;
      if (p_.Label(entered - 1) == label) return entered - 1;
      slot = slot + 1 == p_.slots ? 0 : slot + 1;
    }
  }

  // By pieces of a sample a thread, one after the other; shared: [threads + 1].
  __device__ void RankTile(int tile, int* shared) {
    const int size = p_.TileSize();
    const int begin = tile * size;
    const int end = min(begin + size, p_.batch);
    const int threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x);
    int* const cursor = shared + threads;
    if (thread == 0) *cursor = 0;
    const auto cell = [tile](int group) { return int64_t{group} * kTiles + tile; };

    for (int start = begin; start < end; start += threads) {
      const int i = start + thread;
      int group = i < end ? GroupAt(i) : -1;
      if (group >= 0 && CountOf(group) == 1) group = -1;
      shared[thread] = group;
      __syncthreads();  // the labels are there, and the counts of the piece before
      int counted = 0;  // the new count, at the last of the group in this piece
      if (group >= 0) {
        int rank = 0, count = 0;
        for (int other = 0; other < threads; ++other) {
          count += shared[other] == group;
          rank += shared[other] == group && other < thread;
        }
        const unsigned seen = __ldcg(&groups_[group].tiles) >> tile & 1;
        const int before = seen ? __ldcg(&p_.tile_count[cell(group)]) : 0;
        p_.rank_in_tile[i] = before + rank;
        if (rank == count - 1) counted = before + count;
      }
      __syncthreads();  // everyone has read the labels and the count before
      if (counted > 0) {
        p_.tile_count[cell(group)] = counted;
        atomicOr(&groups_[group].tiles, 1u << tile);
      }
    }
    __syncthreads();
    for (int i = begin + thread; i < end; i += threads) {
      const int group = GroupAt(i);
      if (group < 0 || CountOf(group) == 1 || p_.rank_in_tile[i] != 0) continue;
      p_.tile_start[cell(group)] = atomicAdd(cursor, __ldcg(&p_.tile_count[cell(group)]));
    }
    __syncthreads();
    for (int i = begin + thread; i < end; i += threads) {
      const int group = GroupAt(i);
      if (group < 0 || CountOf(group) == 1) continue;
      p_.tile_order[begin + __ldcg(&p_.tile_start[cell(group)]) + p_.rank_in_tile[i]] = i;
    }
  }

  const Parameters<Feature>& p_;
  int* table_;     // [slots] position of the sample that entered a label, plus one; 0: free
  Group* groups_;  // [B]
  int count_ = 0;
  int rank_ = 0;
  // Of the tile that is this lane's number: its samples of the class, their first rank and place.
  int tile_count_ = 0;
  int tile_rank_ = 0;
  int tile_start_ = 0;
};

// What the warps do with the samples.
template <typename Feature, int Width>
class Rows {
 public:
  using Center = CenterType<Feature>;
  static constexpr int kLane = kPerLane<Center, Width>;
  static constexpr int kPass = kColumns<Center, Width>;
  using Piece = Center[kLane];  // this lane's share of kPass columns

  __device__ explicit Rows(const Parameters<Feature>& p) : p_(p) {
    alpha_ = p.cuda.alpha == nullptr ? p.options.alpha : *p.cuda.alpha;
    moves_ = p.options.update_centers && IsFinite(alpha_) && alpha_ > 0;
  }

  // Whether any center moves; with alpha = 0 none does, so none is touched.
  __device__ bool moves() const { return moves_; }

  __device__ void SetCounted(int counted) {
    counted_ = counted;
    sample_scale_ = ReductionScale(p_.options.reduction, Weight(), counted);
  }

  // Fetches what sample i needs, ahead of the look-up of its class.
  __device__ void Prefetch(int i) {
    if (i >= p_.batch) return;
    PrefetchRow(p_.Features(i), p_.dim);
    const int64_t label = p_.Label(i);
    if (p_.InTable(label)) PrefetchRow(p_.CenterRow(label), p_.dim);
  }

  // An ignored sample, or one whose label is no row of the table.
  __device__ void Without(int i, Center value) {
    if (p_.residual != nullptr) {
      Piece row;
#pragma unroll
      for (int e = 0; e < kLane; ++e) row[e] = value;
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, row);
      }
    }
    if (Lane() == 0) StoreLoss(i, value, value);
  }

  // The only sample of its class, or one of many where no center moves.
  __device__ void Alone(int i, int64_t label) {
    Chunk(label, {1, i}, moves_ ? Sums::kMove : Sums::kNone, nullptr);
  }

  // The chunk that sample i leads, i being the sample of index.SetClass().
  template <typename Index>
  __device__ void Lead(int i, int64_t label, Index& index) {
    const int left = index.count() - index.rank();
    const Members members = index.Find(index.rank(), 1, min(left, kMembers));
    if (index.count() <= kMembers) {
      Chunk(label, members, Sums::kMove, nullptr);
      return;
    }
    int row = 0;
    if (Lane() == 0) row = atomicAdd(&p_.header->pool_rows, 1);
    row = __shfl_sync(kAllLanes, row, 0);
    const int count = Chunk(label, members, Sums::kStore, p_.PoolAt(row));
    if (Lane() == 0) p_.sums_by_leader[i] = PoolRow{row, count};
    Climb(label, index);
  }

  // One sample of a class of several, without an order: adds its residual to the row of the class.
  __device__ void AddAtomically(int i, int64_t label, int group, int members) {
    const int row = __ldcg(&p_.sums_by_leader[group].row);
    Center* const sum = p_.PoolAt(row);
    const int count = Chunk(label, {1, i}, Sums::kAdd, sum);
    if (Lane() == 0 && count > 0) atomicAdd(&p_.sums_by_leader[group].count, count);
    if (!LastToArrive(&p_.arrivals[group], members)) return;
    const int finite = __ldcg(&p_.sums_by_leader[group].count);
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Piece total, zeros;
      LoadRow<Width, Cache::kShared>(sum, column, p_.dim, total);
      MoveCenter(label, column, finite, total);
#pragma unroll
      for (int e = 0; e < kLane; ++e) zeros[e] = 0;
      StoreRow<Width, Cache::kNormal>(sum, column, p_.dim, zeros);
    }
  }

  // The sum of the losses in batch order, by one block; shared: [threads] doubles.
  __device__ void ReduceLoss(double* shared) {
    const int threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x);
    double sum = 0;
    for (int i = thread; i < p_.batch; i += threads) sum += __ldcg(&p_.sample_loss[i]);
    shared[thread] = sum;
    for (int half = threads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) shared[thread] += shared[thread + half];
    }
    if (thread != 0) return;
    sum = shared[0] * static_cast<double>(Weight());
    if (p_.options.reduction == Reduction::kMean) {
      sum = counted_ == 0 ? 0 : sum / static_cast<double>(counted_);
    }
    *p_.loss = static_cast<Center>(sum);
  }

  __device__ bool reduces_loss() const {
    return p_.loss != nullptr && p_.options.reduction != Reduction::kNone;
  }

  __device__ static Center NotANumber() { return static_cast<Center>(FloatOf(0x7fc00000u)); }

 private:
  // Read again at the end of the launch: there is no register to keep it in meanwhile.
  __device__ Center Weight() const {
    // No kernel can raise: a bad alpha shows in the loss.
    if (p_.options.update_centers && !(IsFinite(alpha_) && alpha_ >= 0)) return NotANumber();
    return p_.cuda.weight == nullptr ? p_.options.weight : *p_.cuda.weight;
  }

  // What becomes of the sum of a chunk's residuals.
  enum class Sums { kNone, kMove, kStore, kAdd };

  // Does the members, which lie in the lanes. Returns how many of them are finite.
  __device__ int Chunk(int64_t label, Members members, Sums sums, Center* sum_row) {
    const bool holds = Lane() < members.count;
    Center sample_weight = 1;
    if (p_.sample_weight != nullptr && holds) sample_weight = p_.sample_weight[members.position];
    Center squares = 0;  // ||d||^2 of this lane's member
    // A row longer than kPass has to be gone through before any of it may be added up.
    const bool whole_rows = p_.dim <= kPass;
    unsigned finite = kAllLanes;
    if (!whole_rows && sums != Sums::kNone) finite = FiniteMembers(members);

    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Piece center, sum, row, next;
#pragma unroll
      for (int e = 0; e < kLane; ++e) center[e] = sum[e] = next[e] = 0;
      LoadMember(members, 0, column, row);
      if (!p_.features_are_residuals) {
        LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      }
      for (int m = 0; m < members.count; ++m) {
        if (m + 1 < members.count) LoadMember(members, m + 1, column, next);
        if (whole_rows && !__all_sync(kAllLanes, AllFinite(row))) finite &= ~(1u << m);
        const bool adds = finite >> m & 1;
        Center square = 0;
#pragma unroll
        for (int e = 0; e < kLane; ++e) {
          row[e] -= center[e];
          square += row[e] * row[e];
          sum[e] += adds ? row[e] : Center{0};
        }
        square = WarpSum(square);
        if (Lane() == m) squares += square;
        if (p_.residual != nullptr) {
          const Center scale = __shfl_sync(kAllLanes, sample_weight, m) * sample_scale_;
          const int i = __shfl_sync(kAllLanes, members.position, m);
#pragma unroll
          for (int e = 0; e < kLane; ++e) row[e] *= scale;
          StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, row);
        }
#pragma unroll
        for (int e = 0; e < kLane; ++e) row[e] = next[e];
      }
      const int count = FiniteCount(finite, members);
      if (sums == Sums::kMove) MoveCenter(label, column, count, sum, center);
      if (sums == Sums::kStore) StoreRow<Width, Cache::kNormal>(sum_row, column, p_.dim, sum);
      if (sums == Sums::kAdd && count > 0) AddRow(sum_row, column, sum);
    }
    if (holds) StoreLoss(members.position, sample_weight * (squares / 2), squares);
    return FiniteCount(finite, members);
  }

  __device__ void LoadMember(Members members, int m, int64_t column, Piece& row) {
    const int i = __shfl_sync(kAllLanes, members.position, m);
    LoadRow<Width, Cache::kStreamed>(p_.Features(i), column, p_.dim, row);
  }

  __device__ static bool AllFinite(const Piece& row) {
    bool finite = true;
#pragma unroll
    for (int e = 0; e < kLane; ++e) finite = finite && IsFinite(row[e]);
    return finite;
  }

  __device__ unsigned FiniteMembers(Members members) {
    unsigned finite = 0;
    for (int m = 0; m < members.count; ++m) {
      const int i = __shfl_sync(kAllLanes, members.position, m);
      bool row_is_finite = true;
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        Piece row;
        LoadRow<Width, Cache::kNormal>(p_.Features(i), column, p_.dim, row);
        row_is_finite = row_is_finite && AllFinite(row);
      }
      if (__all_sync(kAllLanes, row_is_finite)) finite |= 1u << m;
    }
    return finite;
  }

  __device__ static int FiniteCount(unsigned finite, Members members) {
    return __popc(finite & ((1u << members.count) - 1));
  }

  __device__ void MoveCenter(int64_t label, int64_t column, int count, const Piece& sum,
                             Piece& center) {
    if (count == 0) return;
    if (p_.features_are_residuals) {
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
    }
    const Center scale = StepScale(p_.options.rule, alpha_, count, counted_);
#pragma unroll
    for (int e = 0; e < kLane; ++e) center[e] += scale * sum[e];
    StoreRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
  }

  __device__ void MoveCenter(int64_t label, int64_t column, int count, const Piece& sum) {
    Piece center;
    LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
    MoveCenter(label, column, count, sum, center);
  }

  __device__ void AddRow(Center* row, int64_t column, const Piece& in) {
#pragma unroll
    for (int v = 0; v < kLane / Width; ++v) {
      const int64_t at = ColumnOf<Width>(column, v);
      if (at >= p_.dim) continue;
      AddVector<Width>(row + at, in + v * Width);
    }
  }

  // Whether this warp is the last of so many at the counter, which is then zero again. What the
  // others wrote before they came is visible to it.
  __device__ bool LastToArrive(int* counter, int arrivals) {
    __syncwarp();  // what the other lanes wrote comes before the fence of the first
    bool last = false;
    if (Lane() == 0) {
      __threadfence();
      last = atomicAdd(counter, 1) == arrivals - 1;
      if (last) *counter = 0;
      __threadfence();
    }
    __syncwarp();  // and what they will read comes after it: a shuffle orders no memory
    return __any_sync(kAllLanes, last);
  }

  // Up the tree from the chunk of index.rank(), as far as this warp is the last to arrive. A node
  // is known by its first chunk, and that by the position of its leader.
  template <typename Index>
  __device__ void Climb(int64_t label, Index& index) {
    const int chunks = (index.count() + kMembers - 1) / kMembers;
    int chunk = index.rank() / kMembers;
    int* arrivals = p_.arrivals;
    for (int64_t width = 1;; width *= kMembers, arrivals += p_.batch) {
      const int64_t node_width = width * kMembers;
      const int first = static_cast<int>(chunk / node_width * node_width);
      const int children =
          static_cast<int>(min((chunks - first + width - 1) / width, int64_t{kMembers}));
      const bool root = node_width >= chunks;
      const Members leaders =
          index.Find(first * kMembers, static_cast<int>(width) * kMembers, children);
      const int name = __shfl_sync(kAllLanes, leaders.position, 0);
      if (!LastToArrive(&arrivals[name], children)) return;

      PoolRow child = {0, 0};
      if (Lane() < children) {
        child.row = __ldcg(&p_.sums_by_leader[leaders.position].row);
        child.count = __ldcg(&p_.sums_by_leader[leaders.position].count);
      }
      const int count = WarpSum(child.count);
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        Piece sum, next;
#pragma unroll
        for (int e = 0; e < kLane; ++e) sum[e] = 0;
        for (int k = 0; k < children; ++k) {
          const int row = __shfl_sync(kAllLanes, child.row, k);
          LoadRow<Width, Cache::kShared>(p_.PoolAt(row), column, p_.dim, next);
#pragma unroll
          for (int e = 0; e < kLane; ++e) sum[e] += next[e];
        }
        if (root) {
          MoveCenter(label, column, count, sum);
        } else {
          StoreRow<Width, Cache::kNormal>(p_.PoolAt(__shfl_sync(kAllLanes, child.row, 0)), column,
                                          p_.dim, sum);
        }
      }
      if (root) return;
      if (Lane() == 0) p_.sums_by_leader[name].count = count;
      chunk = first;
    }
  }

  __device__ void StoreLoss(int i, Center loss, Center squares) {
    if (reduces_loss()) {
      p_.sample_loss[i] = loss;
    } else if (p_.loss != nullptr) {
      p_.loss[i] = loss * sample_scale_;
    }
    if (p_.squared_distance != nullptr) p_.squared_distance[i] = squares;
  }

  const Parameters<Feature>& p_;
  Center alpha_;
  Center sample_scale_ = 0;
  int counted_ = 0;
  bool moves_;
};

// The last block to come sums the losses and readies the header for the next launch.
template <typename Feature, int Width>
__device__ void Finish(const Parameters<Feature>& p, Rows<Feature, Width>& rows,
                       unsigned char* shared, bool hashed) {
  int* const before = reinterpret_cast<int*>(shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *before = atomicAdd(&p.header->done, 1);
    __threadfence();
  }
  __syncthreads();
  const bool last = *before == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!last) return;
  if (rows.reduces_loss()) rows.ReduceLoss(reinterpret_cast<double*>(shared));
  if (threadIdx.x != 0) return;
  Header* const header = p.header;
  header->done = header->counted_blocks = header->ranked_blocks = 0;
  header->pool_rows = header->counted = 0;
  if (!hashed) return;
  header->slots[header->parity] = p.slots;
  header->groups[header->parity] = p.batch;
  header->slots[1 - header->parity] = header->groups[1 - header->parity] = 0;
  header->parity = 1 - header->parity;
}

template <typename Feature, int Width>
__global__ void __launch_bounds__(kScanThreads, kScanResident<CenterType<Feature>>)
    ScanStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  Rows<Feature, Width> rows(p);
  const int warps = static_cast<int>(gridDim.x) * kScanThreads / kWarp;
  const int warp = static_cast<int>(blockIdx.x) * kScanThreads / kWarp + WarpOfBlock();
  rows.Prefetch(warp);
  ScanIndex<Feature> index(p, shared);
  rows.SetCounted(index.Counted());
  for (int i = warp; i < p.batch; i += warps) {
    const int64_t label = p.Label(i);
    if (p.Ignored(label)) {
      rows.Without(i, 0);
    } else if (!p.InTable(label)) {
      rows.Without(i, rows.NotANumber());
    } else if (!rows.moves()) {
      rows.Alone(i, label);
    } else {
      index.SetClass(i);
      if (index.count() == 1) {
        rows.Alone(i, label);
      } else if (index.rank() % kMembers == 0) {
        rows.Lead(i, label, index);
      }
    }
  }
  Finish(p, rows, shared, false);
}

template <typename Feature, int Width, bool kAtomic>
__global__ void __launch_bounds__(kHashThreads, kHashResident)
    HashStep(const __grid_constant__ Parameters<Feature> p) {
  TCL_DYNAMIC_SHARED(shared);
  Rows<Feature, Width> rows(p);
  const int parity = __ldcg(&p.header->parity);
  HashIndex<Feature> index(p, parity);
  const int blocks = static_cast<int>(gridDim.x);
  // A warp takes a few neighbours at a time, one in each lane, to look them up together.
  const int warps = blocks * kHashThreads / kWarp;
  const int warp = static_cast<int>(blockIdx.x) * kHashThreads / kWarp + WarpOfBlock();
  const int most = min(kWarp, max(1, p.batch / warps));
  rows.Prefetch(warp * most);
  index.Enter();
  index.Clear(p, 1 - parity);
  Arrive(&p.header->counted_blocks);
  WaitFor(&p.header->counted_blocks, blocks);
  rows.SetCounted(__ldcg(&p.header->counted));

  if (rows.moves() && !kAtomic) index.RankTiles(reinterpret_cast<int*>(shared));
  if (rows.moves() && kAtomic) {
    // A row of the pool for each class of several.
    for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < p.batch;
         i += blocks * kHashThreads) {
      if (index.GroupAt(i) == i && index.CountOf(i) > 1) {
        p.sums_by_leader[i] = PoolRow{atomicAdd(&p.header->pool_rows, 1), 0};
      }
    }
  }
  Arrive(&p.header->ranked_blocks);

  for (int start = warp * most; start < p.batch; start += warps * most) {
    const int i = start + Lane();
    const bool holds = Lane() < most && i < p.batch;
    const int group = holds ? index.GroupAt(i) : -1;
    const bool alone = holds && (group < 0 || !rows.moves() || index.CountOf(group) == 1);
    for (unsigned left = __ballot_sync(kAllLanes, alone); left != 0; left &= left - 1) {
      const int j = start + __ffs(static_cast<int>(left)) - 1;
      const int64_t label = p.Label(j);
      if (p.Ignored(label)) {
        rows.Without(j, 0);
      } else if (!p.InTable(label)) {
        rows.Without(j, rows.NotANumber());
      } else {
        rows.Alone(j, label);
      }
    }
  }
  if (rows.moves()) {
    WaitFor(&p.header->ranked_blocks, blocks);
    for (int start = warp * most; start < p.batch; start += warps * most) {
      const int i = start + Lane();
      const int group = Lane() < most && i < p.batch ? index.GroupAt(i) : -1;
      const int count = group < 0 ? 1 : index.CountOf(group);
      const bool leads = count > 1 && (kAtomic || index.Leads(i, group));
      for (unsigned left = __ballot_sync(kAllLanes, leads); left != 0; left &= left - 1) {
        const int lane = __ffs(static_cast<int>(left)) - 1;
        const int j = start + lane;
        if constexpr (kAtomic) {
          rows.AddAtomically(j, p.Label(j), __shfl_sync(kAllLanes, group, lane),
                             __shfl_sync(kAllLanes, count, lane));
        } else {
          index.SetClass(j);
          rows.Lead(j, p.Label(j), index);
        }
      }
    }
  }
  Finish(p, rows, shared, true);
}

template <typename Feature>
__global__ void __launch_bounds__(256)
    Backward(const CenterType<Feature>* upstream, bool per_sample,
             const CenterType<Feature>* residual, Feature* gradient, int64_t batch, int64_t dim) {
  const bool in_place = static_cast<const void*>(gradient) == residual;
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / kWarp;
  for (int64_t i = static_cast<int64_t>(blockIdx.x * blockDim.x + threadIdx.x) / kWarp; i < batch;
       i += warps) {
    const CenterType<Feature> factor = upstream[per_sample ? i : 0];
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

// The device's multiprocessors, asked once for each device: the question costs more than a launch.
cudaError_t Multiprocessors(int* count) {
  constexpr int kDevices = 64;
  static int known[kDevices] = {};
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device < kDevices && known[device] > 0) {
    *count = known[device];
    return cudaSuccess;
  }
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && device < kDevices) known[device] = *count;
  return error;
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

template <typename Feature, int Width>
cudaError_t LaunchStep(const Parameters<Feature>& p, void* stream) {
  int multiprocessors;
  if (const cudaError_t error = Multiprocessors(&multiprocessors); error != cudaSuccess) {
    return error;
  }
  if (p.batch <= kScanBatch && !p.cuda.atomic) {
    constexpr int kRows = kScanThreads / kWarp;
    const int64_t shared = Largest(ScanIndex<Feature>::SharedBytes(p.batch),
                                   kScanThreads * static_cast<int64_t>(sizeof(double)));
    const int64_t blocks = Smallest((p.batch + kRows - 1) / kRows, int64_t{8} * multiprocessors);
    return Launch(ScanStep<Feature, Width>, Largest(blocks, 1), kScanThreads, shared, false, stream,
                  p);
  }
  const int64_t shared = (kHashThreads + 1) * static_cast<int64_t>(sizeof(double));
  constexpr int kRows = kHashThreads / kWarp;
  const int64_t blocks =
      Smallest((p.batch + kRows - 1) / kRows, int64_t{kHashResident} * multiprocessors);
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
  p.arrivals = static_cast<int*>(at(layout.arrivals));
  p.sums_by_leader = static_cast<PoolRow*>(at(layout.sums_by_leader));
  p.group_of = static_cast<int*>(at(layout.group_of));
  p.rank_in_tile = static_cast<int*>(at(layout.rank_in_tile));
  p.tile_count = static_cast<int*>(at(layout.tile_count));
  p.tile_start = static_cast<int*>(at(layout.tile_start));
  p.tile_order = static_cast<int*>(at(layout.tile_order));
  p.sample_loss = static_cast<Center*>(at(layout.sample_loss));
  p.pool = static_cast<Center*>(at(layout.pool));

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
  int multiprocessors;
  if (const cudaError_t error = Multiprocessors(&multiprocessors); error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(Smallest((batch + 7) / 8, int64_t{8} * multiprocessors)));
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
