// Large batches: the blocks count the labels together in a hash table, then meet at a grid barrier.
//
// A class is known by its *owner*, the sample that entered the label. The others are counted at the
// owner, and the first of them leave their positions there: enough for a class of one chunk. The
// samples of a heavy class are sorted tile by tile: a sample's place in its tile is the number of
// samples there that come before it, by class and then by position. A rank in the batch is the rank
// in the tile plus the counts of the class in earlier tiles.

#ifndef TF_CENTER_LOSS_OP_CUDA_HASHED_LABELS_CUH_
#define TF_CENTER_LOSS_OP_CUDA_HASHED_LABELS_CUH_

#include <cstdint>

#include "cuda/class_sums.cuh"
#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

template <typename Feature>
class HashedLabels {
 public:
  __device__ HashedLabels(const Parameters<Feature>& p, int parity)
      : p_(p),
        counters_(&p.header->counters[parity]),
        table_(p.table[parity]),
        others_(p.others[parity]) {}

  // Enters sample i, a sample in each lane; i >= B: none. `is_member`: its label is a row of the
  // table whose center moves. Returns the owner of its class, -1 where it has none. With `atomic`
  // every class of several samples takes a row of the pool.
  __device__ int Enter(int i, int64_t label, bool is_member, bool atomic) {
    const unsigned same = __match_any_sync(kAllLanes, is_member ? label : -1 - Lane());
    const int leader = __ffs(static_cast<int>(same)) - 1;
    int owner = -1, place = 0;
    if (is_member && leader == Lane()) {
      owner = FindOwner(label, i);
      const int owns = owner == i;
      const int others = __popc(same) - owns;
      // The owner itself has no place, so the one behind it takes the first.
      if (others > 0) place = atomicAdd(&others_[owner], others) - owns;
    }
    owner = __shfl_sync(kAllLanes, owner, leader);
    place = __shfl_sync(kAllLanes, place, leader) + __popc(same & ((1u << Lane()) - 1));
    if (i < p_.batch) p_.owner_of[i] = owner;
    if (owner == i) p_.not_finite[i] = 0;
    if (!is_member || owner == i) return owner;
    if (place < kChunk - 1) p_.members[int64_t{owner} * kChunk + place] = i;
    if (place == 1) atomicAdd(&counters_->large_classes.value, 1);
    if (place == kChunk - 1) NumberHeavyClass(owner);
    if (atomic && place == 0) {
      const int row = atomicAdd(&counters_->pool_rows.value, 1);
      p_.first_pool_row[owner] = row;
    }
    return owner;
  }

  // Counts the samples of this warp that are not ignored.
  __device__ void Count(int counted) {
    counted = WarpSum(counted);
    if (Lane() == 0 && counted > 0) atomicAdd(&counters_->counted.value, counted);
  }

  // What follows is known once all blocks have entered their samples.
  __device__ int Counted() const {
    return p_.options.has_ignore_class ? __ldcg(&counters_->counted.value) : p_.batch;
  }
  __device__ bool HasLarge() const { return __ldcg(&counters_->large_classes.value) != 0; }
  __device__ bool HasHeavy() const { return __ldcg(&counters_->heavy_classes.value) != 0; }
  __device__ int OwnerOf(int i) const { return __ldcg(&p_.owner_of[i]); }
  __device__ int CountOf(int owner) const { return 1 + __ldcg(&others_[owner]); }

  // The sample of the class beside its owner, where it has two.
  __device__ int PartnerOf(int owner) const { return __ldcg(&p_.members[int64_t{owner} * kChunk]); }
  __device__ void CountNotFinite(int owner) { atomicAdd(&p_.not_finite[owner], 1); }

  // Lists the chunks of the classes that the lanes own, of `count` samples; 0: none.
  __device__ void ListChunks(int owner, int count) {
    const int chunks = count < 3 ? 0 : (count + kChunk - 1) / kChunk;
    const int place = Take(&counters_->chunks.value, chunks);
    const int row = Take(&counters_->pool_rows.value, chunks > 1 ? chunks : 0);
    if (chunks > 0) p_.first_chunk[owner] = place;
    if (chunks > 1) p_.first_pool_row[owner] = row;
    for (unsigned left = __ballot_sync(kAllLanes, chunks > 0); left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const int first = __shfl_sync(kAllLanes, place, lane);
      const int end = first + __shfl_sync(kAllLanes, chunks, lane);
      const int its_owner = __shfl_sync(kAllLanes, owner, lane);
      for (int k = first + Lane(); k < end; k += kWarp) p_.class_of_chunk[k] = its_owner;
    }
  }

  // Sorts this block's share of the samples of heavy classes into their tiles.
  __device__ void RankHeavy() {
    const int threads = static_cast<int>(gridDim.x * blockDim.x);
    const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    for (int i = thread; i < p_.batch; i += threads) {
      const int owner = OwnerOf(i);
      if (owner >= 0 && CountOf(owner) > kChunk) RankInTile(i, owner);
    }
  }

  // A ticket for a group of the samples that no warp has been given; by one lane.
  __device__ int TakeTicket() { return atomicAdd(&counters_->tickets.value, 1); }

  // What follows is known once all blocks have listed and ranked theirs.
  __device__ int Chunks() const { return __ldcg(&counters_->chunks.value); }

  // The chunk with this place in the list, and its samples in batch order.
  __device__ Chunk FindChunk(int place, int* members) const {
    const int owner = __ldcg(&p_.class_of_chunk[place]);
    const int count = CountOf(owner);
    Chunk chunk;
    chunk.label = p_.Label(owner);
    chunk.all_finite = __ldcg(&p_.not_finite[owner]) == 0;
    chunk.chunks = (count + kChunk - 1) / kChunk;
    if (chunk.chunks == 1) {
      chunk.count = count;
      FindAll(owner, count, members);
      return chunk;
    }
    chunk.chunk = place - __ldcg(&p_.first_chunk[owner]);
    chunk.count = min(count - chunk.chunk * kChunk, kChunk);
    chunk.first_pool_row = __ldcg(&p_.first_pool_row[owner]);
    FindRanks(owner, chunk.chunk * kChunk, chunk.count, members);
    return chunk;
  }

  // Clears this block's share of what the next launch uses. Its first warp has other work.
  __device__ static void ClearNext(const Parameters<Feature>& p, int parity) {
    const int own_threads = static_cast<int>(blockDim.x) - kWarp;
    const int thread =
        static_cast<int>(blockIdx.x) * own_threads + static_cast<int>(threadIdx.x) - kWarp;
    const int threads = static_cast<int>(gridDim.x) * own_threads;
    if (static_cast<int>(threadIdx.x) < kWarp) return;
    if (thread == 0) {
      Counters& counters = p.header->counters[parity];
      counters.counted_blocks.value = counters.done_blocks.value = 0;
      counters.large_classes.value = counters.heavy_classes.value = 0;
      counters.chunks.value = counters.pool_rows.value = counters.counted.value = 0;
      counters.tickets.value = 0;
    }
    const int slots = __ldcg(&p.header->slots[parity]);
    const int samples = __ldcg(&p.header->samples[parity]);
    for (int k = thread; k < slots; k += threads) p.table[parity][k] = 0;
    for (int k = thread; k < samples; k += threads) p.others[parity][k] = 0;
  }

 private:
  // Finds the owner of the label, or makes it sample i.
  __device__ int FindOwner(int64_t label, int i) {
    // Fibonacci hashing: the high bits of label * 2^64 / golden ratio spread strided labels, too.
    const uint64_t hash = static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u;
    int slot = static_cast<int>((hash >> 32) * static_cast<uint64_t>(p_.slots) >> 32);
    const auto own = static_cast<unsigned long long>(label) << 32 | static_cast<unsigned>(i + 1);
    for (;;) {
      const unsigned long long entered = atomicCAS(&table_[slot], 0ull, own);
      if (entered == 0) return i;
      const int owner = static_cast<int>(entered & 0xffffffff) - 1;
      // Half a label is a whole one in any table of less than 2^32 rows.
      if (entered >> 32 == own >> 32 && (p_.classes >> 32 == 0 || p_.Label(owner) == label)) {
        return owner;
      }
      slot = slot + 1 == p_.slots ? 0 : slot + 1;
    }
  }

  // Takes as many numbers as each lane wants from a counter; the first of the lane's.
  __device__ int Take(int* counter, int wanted) {
    const int before = WarpSumBefore(wanted);
    const int all = __shfl_sync(kAllLanes, before + wanted, kWarp - 1);
    const int first = Lane() == 0 && all > 0 ? atomicAdd(counter, all) : 0;
    return __shfl_sync(kAllLanes, first, 0) + before;
  }

  // The samples of a class of one chunk: the owner and those that are listed there, sorted.
  __device__ void FindAll(int owner, int count, int* members) const {
    const int lane = Lane();
    int position = owner;
    if (lane > 0 && lane < count) {
      position = __ldcg(&p_.members[int64_t{owner} * kChunk + lane - 1]);
    }
    int rank = 0;
    for (int k = 0; k < count; ++k) rank += __shfl_sync(kAllLanes, position, k) < position;
    if (lane < count) members[rank] = position;
  }

  // The samples of a heavy class of the ranks first, first + 1, ...
  __device__ void FindRanks(int owner, int first, int count, int* members) const {
    const unsigned* const own = p_.tile_part + int64_t{__ldcg(&p_.heavy_class[owner])} * kTiles;
    const uint4 four = __ldcg(reinterpret_cast<const uint4*>(own) + Lane());
    const int before = WarpSumBefore(
        static_cast<int>((four.x >> 16) + (four.y >> 16) + (four.z >> 16) + (four.w >> 16)));
    int rank = first + min(Lane(), count - 1);
    int lane = 0;  // the last whose tiles begin with this rank or a smaller one
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      if (__shfl_sync(kAllLanes, before, lane + step) <= rank) lane += step;
    }
    rank -= __shfl_sync(kAllLanes, before, lane);
    const unsigned parts[] = {
        __shfl_sync(kAllLanes, four.x, lane), __shfl_sync(kAllLanes, four.y, lane),
        __shfl_sync(kAllLanes, four.z, lane), __shfl_sync(kAllLanes, four.w, lane)};
    int at = 0;
    bool found = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int here = static_cast<int>(parts[e] >> 16);
      if (!found) at = (4 * lane + e) * p_.TileSize() + static_cast<int>(parts[e] & 0xffff) + rank;
      found = found || rank < here;
      if (!found) rank -= here;
    }
    if (Lane() < count) members[Lane()] = __ldcg(&p_.tile_order[at]);
  }

  // Gives the owner's class a number, and no samples in any tile yet.
  __device__ void NumberHeavyClass(int owner) {
    const int number = atomicAdd(&counters_->heavy_classes.value, 1);
    p_.heavy_class[owner] = number;
    uint4* const parts = reinterpret_cast<uint4*>(p_.tile_part + int64_t{number} * kTiles);
    for (int k = 0; k < kTiles / 4; ++k) parts[k] = uint4{0, 0, 0, 0};
  }

  // Finds the place of sample i in its tile by comparison with all samples there: those of owners
  // that come first, and those of its own class at earlier positions. The first one of a class
  // stores where the class begins and how many it has.
  __device__ void RankInTile(int i, int owner) {
    const int size = p_.TileSize();
    const int tile = i / size, begin = tile * size, end = min(begin + size, p_.batch);
    int smaller = 0, same = 0, before = 0;
#pragma unroll 4
    for (int j = begin; j < end; j += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(p_.owner_of + j);
      const unsigned owners[] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int other = static_cast<int>(owners[e]);
        smaller += other < owner && j + e < end;
        same += other == owner && j + e < end;
        before += other == owner && j + e < i;
      }
    }
    p_.tile_order[begin + smaller + before] = i;
    if (before > 0) return;
    const int number = __ldcg(&p_.heavy_class[owner]);
    p_.tile_part[int64_t{number} * kTiles + tile] =
        static_cast<unsigned>(same) << 16 | static_cast<unsigned>(smaller);
  }

  const Parameters<Feature>& p_;
  Counters* counters_;
  unsigned long long* table_;
  int* others_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_HASHED_LABELS_CUH_
