// How a sample learns the count of its class, its rank among the samples of its class, and where
// those of other ranks are.
//
// ScanIndex: each warp scans the labels in shared memory, B / 32 steps. No barrier.
// HashIndex: all blocks count the labels in a hash table; then up to kTiles blocks rank the samples
//   whose label is not alone, each those of one tile of the batch, in order. A rank in the batch is
//   the rank in the tile and the counts of the class in the tiles before. Between the two, and
//   after them, all blocks have to meet.

#ifndef TF_CENTER_LOSS_OP_CUDA_LABEL_RANKS_CUH_
#define TF_CENTER_LOSS_OP_CUDA_LABEL_RANKS_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// Up to kWarp of a class's samples, of consecutive ranks, one in each lane.
struct Members {
  int count;     // lanes that hold one
  int position;  // in the batch
};

// The pieces that the work on a class of `count` samples is cut into: chunks of kMembers samples,
// and of more than kWholeMembers samples parts of each chunk by columns. Piece k, part k % parts of
// chunk k / parts, is done by the warp of the sample of rank k * stride: the pieces spread over the
// batch.
struct Pieces {
  int chunks;
  int parts;
  int stride;

  __device__ Pieces(int count, int parts_of_a_chunk)
      : chunks((count + kMembers - 1) / kMembers),
        parts(count <= kWholeMembers ? 1 : parts_of_a_chunk),
        stride(count / (chunks * parts)) {}

  __device__ bool Has(int rank) const {
    return rank % stride == 0 && rank / stride < chunks * parts;
  }
};
static_assert(kParts <= kWholeMembers && 2 * kParts <= kMembers, "a sample for each piece");

// Ranks by scanning the labels, which lie in shared memory.
template <typename Feature>
class ScanIndex {
 public:
  __device__ ScanIndex(const Parameters<Feature>& p, unsigned char* shared)
      : p_(p), labels_(reinterpret_cast<int64_t*>(shared)) {
    found_ = reinterpret_cast<int*>(labels_ + p.batch) + WarpOfBlock() * kWarp;
    constexpr int kLoads = 4;  // in flight
    const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x); first < p.batch; first += kLoads * threads) {
      int64_t labels[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) labels[k] = p.Label(min(first + k * threads, p.batch - 1));
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        if (first + k * threads < p.batch) labels_[first + k * threads] = labels[k];
      }
    }
    __syncthreads();
  }

  static int64_t SharedBytes(int64_t batch, int threads) {
    return batch * static_cast<int64_t>(sizeof(int64_t)) +
           threads * static_cast<int64_t>(sizeof(int));
  }

  __device__ int64_t LabelAt(int i) const { return labels_[i]; }

  __device__ int Counted() const {
    if (!p_.options.has_ignore_label) return p_.batch;
    int counted = 0;
    for (int i = Lane(); i < p_.batch; i += kWarp) counted += !p_.Ignored(labels_[i]);
    return WarpSum(counted);
  }

  // The class of sample i from here on, its count and the rank of i.
  __device__ void SetClass(int i) {
    label_ = labels_[i];
    int same[2] = {0, 0};  // all, and those before i
    for (int j = Lane(); j < p_.batch; j += kWarp) {
      const bool equal = labels_[j] == label_;
      same[0] += equal;
      same[1] += equal && j < i;
    }
    WarpSums(same);
    count_ = same[0];
    rank_ = same[1];
  }

  __device__ int64_t label() const { return label_; }
  __device__ int count() const { return count_; }
  __device__ int rank() const { return rank_; }

  // The samples of the ranks first, first + 1, ...
  __device__ Members Find(int first, int count) {
    int before = 0;
    for (int start = 0; start < p_.batch && before < first + count; start += kWarp) {
      const int j = start + Lane();
      const bool same = j < p_.batch && labels_[j] == label_;
      const unsigned all = __ballot_sync(kAllLanes, same);
      const int rank = before + __popc(all & ((1u << Lane()) - 1));
      if (same && rank >= first && rank < first + count) found_[rank - first] = j;
      before += __popc(all);
    }
    __syncwarp();
    const Members members = {count, Lane() < count ? found_[Lane()] : 0};
    __syncwarp();
    return members;
  }

  // Of the rows of a class of more than kWholeMembers samples: from where its samples would lie if
  // the batch was sorted, so that no two classes share one.
  __device__ int FirstPoolRow() const {
    int smaller = 0;
    for (int j = Lane(); j < p_.batch; j += kWarp) smaller += labels_[j] < label_;
    return WarpSum(smaller) / kWholeMembers;
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
      : p_(p),
        counters_(&p.header->counters[parity]),
        table_(p.table[parity]),
        groups_(p.groups[parity]) {}

  // Enters this block's share of the labels, once for each warp and label; none where no center
  // moves.
  __device__ void Enter(bool moves) {
    int counted = 0;
    const int threads = static_cast<int>(gridDim.x * blockDim.x);
    const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    for (int start = thread - Lane(); start < p_.batch; start += threads) {
      const int i = start + Lane();
      const int64_t label = i < p_.batch ? p_.Label(i) : -1;
      const bool is_counted = i < p_.batch && !p_.Ignored(label);
      const bool enters = moves && is_counted && p_.InTable(label);
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
    if (!p_.options.has_ignore_label) return;
    counted = WarpSum(counted);
    if (Lane() == 0 && counted > 0) atomicAdd(&counters_->counted.value, counted);
  }

  // Once all have entered theirs.
  __device__ int Counted() const {
    return p_.options.has_ignore_label ? __ldcg(&counters_->counted.value) : p_.batch;
  }

  // For each tile of this block's share: the order of its samples of classes with several, and
  // their ranks among the tile's; rows of the pool for classes of more than kWholeMembers.
  __device__ void RankTiles(int* shared) {
    for (int tile = static_cast<int>(blockIdx.x); tile < kTiles;
         tile += static_cast<int>(gridDim.x)) {
      RankTile(tile, shared);
    }
  }

  // A group is known by the position of the sample that entered it.
  __device__ int GroupAt(int i) const { return __ldcg(&p_.group_of[i]); }
  __device__ int CountOf(int group) const { return __ldcg(&groups_[group].count); }

  // Whether sample i, of a group of `count`, has a piece. Each lane asks for a sample of its own.
  __device__ bool HasPiece(int i, int group, int count) const {
    const unsigned tiles = __ldcg(&groups_[group].tiles);
    const unsigned before = tiles & ((1u << (i / p_.TileSize())) - 1);
    int rank = __ldcg(&p_.rank_in_tile[i]);
    const auto* const counts =
        reinterpret_cast<const uint4*>(p_.tile_count + int64_t{group} * kTiles);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 4) {
      const uint4 four = __ldcg(&counts[tile / 4]);
      const unsigned count_of[] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) rank += before >> (tile + e) & 1 ? count_of[e] : 0;
    }
    return Pieces(count, p_.parts).Has(rank);
  }

  // The first of so many rows of the pool that nobody else has.
  __device__ int TakePoolRows(int rows) { return atomicAdd(&counters_->pool_rows.value, rows); }

  // The class of sample i from here on, its count and the rank of i.
  __device__ void SetClass(int i) {
    label_ = p_.Label(i);
    group_ = GroupAt(i);
    count_ = CountOf(group_);
    const unsigned tiles = __ldcg(&groups_[group_].tiles);
    const int64_t at = int64_t{group_} * kTiles + Lane();
    const bool here = tiles >> Lane() & 1;
    tile_count_ = here ? __ldcg(&p_.tile_count[at]) : 0;
    tile_start_ = here ? __ldcg(&p_.tile_start[at]) : 0;
    tile_rank_ = WarpSumBefore(tile_count_);
    rank_ = __shfl_sync(kAllLanes, tile_rank_, i / p_.TileSize()) + __ldcg(&p_.rank_in_tile[i]);
  }

  __device__ int64_t label() const { return label_; }
  __device__ int count() const { return count_; }
  __device__ int rank() const { return rank_; }

  // The samples of the ranks first, first + 1, ...
  __device__ Members Find(int first, int count) const {
    const int rank = first + Lane();
    int tile = 0;  // the last that starts with this rank or a smaller one
#pragma unroll
    for (int step = kTiles / 2; step > 0; step /= 2) {
      if (__shfl_sync(kAllLanes, tile_rank_, tile + step) <= rank) tile += step;
    }
    const int start = __shfl_sync(kAllLanes, tile_start_, tile);
    const int begin = __shfl_sync(kAllLanes, tile_rank_, tile);
    const int at = tile * p_.TileSize() + start + rank - begin;
    return {count, Lane() < count ? __ldcg(&p_.tile_order[at]) : 0};
  }

  // Of the rows of a class of more than kWholeMembers samples.
  __device__ int FirstPoolRow() const { return __ldcg(&p_.first_pool_row[group_]); }

  // Clears this block's share of what the next launch uses.
  __device__ static void Clear(const Parameters<Feature>& p, int parity) {
    const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const int threads = static_cast<int>(gridDim.x * blockDim.x);
    if (thread == 0) {
      Counters& counters = p.header->counters[parity];
      counters.counted_blocks.value = counters.ranked_blocks.value = 0;
      counters.pool_rows.value = counters.counted.value = 0;
    }
    const int slots = __ldcg(&p.header->slots[parity]);
    const int groups = __ldcg(&p.header->groups[parity]);
    for (int k = thread; k < slots; k += threads) p.table[parity][k] = 0;
    for (int k = thread; k < groups; k += threads) p.groups[parity][k] = Group{0, 0};
  }

  static int64_t SharedBytes(int threads) {
    return (2 * threads + threads / kWarp + 1) * static_cast<int64_t>(sizeof(int));
  }

 private:
  // Finds the group of the label, or makes i its name.
  __device__ int GroupOf(int64_t label, int i) {
    // The high bits of label * 2^64 / golden ratio: labels that share a stride spread, too.
    const uint64_t hash = static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u;
    int slot = static_cast<int>((hash >> 32) * static_cast<uint64_t>(p_.slots) >> 32);
    for (;;) {
      int entered = LoadRelaxed(&table_[slot]);
      if (entered == 0) entered = atomicCAS(&table_[slot], 0, i + 1);
      if (entered == 0) return i;
      if (p_.Label(entered - 1) == label) return entered - 1;
      slot = slot + 1 == p_.slots ? 0 : slot + 1;
    }
  }

  // By pieces of a sample a thread, one after the other.
  __device__ void RankTile(int tile, int* shared) {
    const int size = p_.TileSize();
    const int begin = tile * size;
    const int end = min(begin + size, p_.batch);
    const int threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x);
    // What the warps have in a piece of classes with several: their groups, and samples of each.
    int* const groups = shared;
    int* const counts = groups + threads;
    int* const groups_of_warp = counts + threads;
    int* const cursor = groups_of_warp + threads / kWarp;
    if (thread == 0) *cursor = 0;
    const auto cell = [tile](int group) { return int64_t{group} * kTiles + tile; };

    for (int start = begin; start < end; start += threads) {
      const int i = start + thread;
      int group = i < end ? GroupAt(i) : -1;
      if (group >= 0 && CountOf(group) == 1) group = -1;
      const unsigned before_lane = (1u << Lane()) - 1;
      const unsigned same = __match_any_sync(kAllLanes, group >= 0 ? group : -1 - Lane());
      const bool first_of_warp = group >= 0 && (same & before_lane) == 0;
      const unsigned firsts = __ballot_sync(kAllLanes, first_of_warp);
      if (Lane() == 0) groups_of_warp[WarpOfBlock()] = __popc(firsts);
      __syncthreads();  // how many each warp has is there, and the counts of the piece before
      int begin_of_warp = 0, places = 0;
      for (int warp = 0; warp < threads / kWarp; ++warp) {
        if (warp < WarpOfBlock()) begin_of_warp += groups_of_warp[warp];
        places += groups_of_warp[warp];
      }
      if (first_of_warp) {
        groups[begin_of_warp + __popc(firsts & before_lane)] = group;
        counts[begin_of_warp + __popc(firsts & before_lane)] = __popc(same);
      }
      __syncthreads();  // the groups are there
      int counted = 0;  // the new count, at the last of the group in this piece
      if (group >= 0) {
        int rank = __popc(same & before_lane), count = 0;
        for (int place = 0; place < places; ++place) {
          const int others = groups[place] == group ? counts[place] : 0;
          count += others;
          rank += place < begin_of_warp ? others : 0;
        }
        const unsigned seen = __ldcg(&groups_[group].tiles) >> tile & 1;
        const int before = seen ? __ldcg(&p_.tile_count[cell(group)]) : 0;
        p_.rank_in_tile[i] = before + rank;
        if (rank == count - 1) counted = before + count;
      }
      __syncthreads();  // everyone has read the groups and the count before
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
      if (group == i && CountOf(group) > kWholeMembers) {
        const int chunks = Pieces(CountOf(group), 1).chunks;
        p_.first_pool_row[group] = TakePoolRows(chunks);
      }
      p_.tile_order[begin + __ldcg(&p_.tile_start[cell(group)]) + p_.rank_in_tile[i]] = i;
    }
  }

  const Parameters<Feature>& p_;
  Counters* counters_;
  int* table_;     // [slots] position of the sample that entered a label, plus one; 0: free
  Group* groups_;  // [B]
  int64_t label_ = 0;
  int group_ = 0;
  int count_ = 0;
  int rank_ = 0;
  // Of the tile that is this lane's number: its samples of the class, their first rank and place.
  int tile_count_ = 0;
  int tile_rank_ = 0;
  int tile_start_ = 0;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_LABEL_RANKS_CUH_
