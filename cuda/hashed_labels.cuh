// Labels of the hash kernel, for large batches: all blocks insert the labels into one hash table
// and count the samples of each class, then meet at a grid barrier.
//
// The sample whose insertion created the slot of a label is the *owner* of the class: arrays [B]
// are indexed by its position. The other samples (duplicates) increment a counter at the owner, and
// the first 31 store their positions in its entries of `duplicate_positions`, which is enough for a
// class of one chunk.
//
// The chunks of a multi-chunk class follow batch order, so its samples must be found by their
// ranks. For that the batch is cut into kTiles tiles of adjacent samples. Each sample of a
// multi-chunk class is written to its place in its tile: its index if the tile were sorted by owner
// and position. For each such class and tile, the number of samples and the first place are stored
// (PlaceInTile). A prefix sum of these numbers over the tiles leads from a rank to the sample
// (GatherRanks).

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
        duplicates_(p.duplicates[parity]) {}

  // Each lane inserts one sample (none if i >= B). Returns the owner of its class, or -1 if
  // `moves_center` is false: the step does not move the center of this label. Counts the large and
  // the multi-chunk classes. With `atomic`, each class of two samples or more gets a partial sum.
  // The lanes with equal labels share one insertion and one atomicAdd, by the lowest of them.
  __device__ int Insert(int i, int64_t label, bool moves_center, bool atomic) {
    // Without a center to move, the key is negative: it equals no label and no other lane's key.
    const unsigned same = __match_any_sync(kAllLanes, moves_center ? label : -1 - Lane());
    const int leader = __ffs(static_cast<int>(same)) - 1;
    int owner = -1, number = 0;
    if (moves_center && leader == Lane()) {
      owner = FindOrInsert(label, i);
      const int owns = owner == i;
      const int duplicates = __popc(same) - owns;
      // The duplicates of a class are numbered from 0. These lanes get the next `duplicates`
      // numbers, in the order of the lanes. An owner is no duplicate: its lane gets the number
      // before them, which is not used.
      if (duplicates > 0) number = atomicAdd(&duplicates_[owner], duplicates) - owns;
    }
    owner = __shfl_sync(kAllLanes, owner, leader);
    number = __shfl_sync(kAllLanes, number, leader) + __popc(same & ((1u << Lane()) - 1));
    if (i < p_.batch) p_.owner_of[i] = owner;
    if (owner == i) p_.non_finite[i] = 0;
    if (!moves_center || owner == i) return owner;
    // Number 0 is the second sample of the class, number 1 the third, which makes the class large,
    // and number kChunk - 1 the first sample beyond one chunk.
    if (number < kChunk - 1) p_.duplicate_positions[int64_t{owner} * kChunk + number] = i;
    if (number == 1) atomicAdd(&counters_->large_classes.value, 1);
    if (number == kChunk - 1) AddMultiChunkClass(owner);
    if (atomic && number == 0) {
      const int row = atomicAdd(&counters_->partial_sums.value, 1);
      p_.first_partial_sum[owner] = row;
    }
    return owner;
  }

  // Adds up `counted`, the number of the lane's samples that are not ignored, over the lanes, and
  // adds the sum to N.
  __device__ void Count(int counted) {
    counted = WarpSum(counted);
    if (Lane() == 0 && counted > 0) atomicAdd(&counters_->counted.value, counted);
  }

  // The following functions are valid after the grid barrier labels_counted.
  __device__ int Counted() const {
    return p_.options.has_ignore_class ? __ldcg(&counters_->counted.value) : p_.batch;
  }
  __device__ bool HasLarge() const { return __ldcg(&counters_->large_classes.value) != 0; }
  __device__ bool HasMultiChunk() const {
    return __ldcg(&counters_->multi_chunk_classes.value) != 0;
  }
  __device__ int OwnerOf(int i) const { return __ldcg(&p_.owner_of[i]); }
  __device__ int CountOf(int owner) const { return 1 + __ldcg(&duplicates_[owner]); }

  // The other sample of a pair.
  __device__ int PartnerOf(int owner) const {
    return __ldcg(&p_.duplicate_positions[int64_t{owner} * kChunk]);
  }
  __device__ void CountNonFinite(int owner) { atomicAdd(&p_.non_finite[owner], 1); }

  // Lists the chunks of large classes. Each lane passes a sample and the size of the class that
  // this sample owns (0 if it owns none); classes of fewer than three samples are not listed.
  __device__ void ListChunks(int owner, int count) {
    const int chunks = count < 3 ? 0 : (count + kChunk - 1) / kChunk;
    const int first_chunk = Reserve(&counters_->chunks.value, chunks);
    const int row = Reserve(&counters_->partial_sums.value, chunks > 1 ? chunks : 0);
    if (chunks > 0) p_.first_chunk[owner] = first_chunk;
    if (chunks > 1) p_.first_partial_sum[owner] = row;
    for (unsigned left = __ballot_sync(kAllLanes, chunks > 0); left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const int first = __shfl_sync(kAllLanes, first_chunk, lane);
      const int end = first + __shfl_sync(kAllLanes, chunks, lane);
      const int its_owner = __shfl_sync(kAllLanes, owner, lane);
      for (int k = first + Lane(); k < end; k += kWarp) p_.owner_of_chunk[k] = its_owner;
    }
  }

  // Calls PlaceInTile for this thread's share of the samples of multi-chunk classes.
  __device__ void SortIntoTiles() {
    const int threads = static_cast<int>(gridDim.x * blockDim.x);
    const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    for (int i = thread; i < p_.batch; i += threads) {
      const int owner = OwnerOf(i);
      if (owner >= 0 && CountOf(owner) > kChunk) PlaceInTile(i, owner);
    }
  }

  // Takes a ticket for the next kSamplesPerTicket samples. One lane calls it.
  __device__ int TakeTicket() { return atomicAdd(&counters_->tickets.value, 1); }

  // The following functions are valid after the grid barrier centers_read.
  __device__ int Chunks() const { return __ldcg(&counters_->chunks.value); }

  // Returns the chunk with this index in the list, and stores its members.
  __device__ Chunk FindChunk(int index, int* members) const {
    const int owner = __ldcg(&p_.owner_of_chunk[index]);
    const int count = CountOf(owner);
    Chunk chunk;
    chunk.label = p_.Label(owner);
    chunk.all_finite = __ldcg(&p_.non_finite[owner]) == 0;
    chunk.chunks = (count + kChunk - 1) / kChunk;
    if (chunk.chunks == 1) {
      chunk.count = count;
      GatherAll(owner, count, members);
      return chunk;
    }
    chunk.chunk = index - __ldcg(&p_.first_chunk[owner]);
    chunk.count = min(count - chunk.chunk * kChunk, kChunk);
    chunk.first_partial_sum = __ldcg(&p_.first_partial_sum[owner]);
    GatherRanks(owner, chunk.chunk * kChunk, chunk.count, members);
    return chunk;
  }

  // Clears this block's share of the set that the next launch uses (struct Header): the counters,
  // the hash table and `duplicates` with index `parity`. The first warp does not take part, because
  // it polls the grid barrier.
  __device__ static void ClearNext(const Parameters<Feature>& p, int parity) {
    const int own_threads = static_cast<int>(blockDim.x) - kWarp;
    const int thread =  // among the threads that take part
        static_cast<int>(blockIdx.x) * own_threads + static_cast<int>(threadIdx.x) - kWarp;
    const int threads = static_cast<int>(gridDim.x) * own_threads;
    if (static_cast<int>(threadIdx.x) < kWarp) return;
    if (thread == 0) {
      Counters& counters = p.header->counters[parity];
      counters.labels_counted.value = counters.centers_read.value = 0;
      counters.large_classes.value = counters.multi_chunk_classes.value = 0;
      counters.chunks.value = counters.partial_sums.value = counters.counted.value = 0;
      counters.tickets.value = 0;
    }
    const int slots = __ldcg(&p.header->slots[parity]);
    const int samples = __ldcg(&p.header->samples[parity]);
    for (int k = thread; k < slots; k += threads) p.table[parity][k] = 0;
    for (int k = thread; k < samples; k += threads) p.duplicates[parity][k] = 0;
  }

 private:
  // Returns the owner of the label. If there is none, sample i becomes the owner.
  __device__ int FindOrInsert(int64_t label, int i) {
    // Fibonacci hashing: the high bits of label * 2^64 / golden ratio spread strided labels too.
    const uint64_t hash = static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u;
    int slot = static_cast<int>((hash >> 32) * static_cast<uint64_t>(p_.slots) >> 32);
    // A slot: the lower half of the label above the owner's position + 1; 0 if it is free.
    const auto own = static_cast<unsigned long long>(label) << 32 | static_cast<unsigned>(i + 1);
    for (;;) {
      const unsigned long long entered = atomicCAS(&table_[slot], 0ull, own);
      if (entered == 0) return i;
      const int owner = static_cast<int>(entered & 0xffffffff) - 1;
      // The upper half of a slot is the lower half of a label. With fewer than 2^32 classes it
      // identifies the label; otherwise the owner's label is compared as well.
      if (entered >> 32 == own >> 32 && (p_.classes >> 32 == 0 || p_.Label(owner) == label)) {
        return owner;
      }
      slot = slot + 1 == p_.slots ? 0 : slot + 1;
    }
  }

  // Reserves `wanted` consecutive numbers for each lane, with one atomicAdd for the warp. Returns
  // the lane's first number.
  __device__ int Reserve(int* counter, int wanted) {
    const int before = WarpExclusiveSum(wanted);
    const int all = __shfl_sync(kAllLanes, before + wanted, kWarp - 1);
    const int first = Lane() == 0 && all > 0 ? atomicAdd(counter, all) : 0;
    return __shfl_sync(kAllLanes, first, 0) + before;
  }

  // Stores the members of a chunk that is a whole class: the positions of the owner and of its
  // duplicates, sorted.
  __device__ void GatherAll(int owner, int count, int* members) const {
    const int lane = Lane();
    int position = owner;
    if (lane > 0 && lane < count) {
      position = __ldcg(&p_.duplicate_positions[int64_t{owner} * kChunk + lane - 1]);
    }
    int rank = 0;
    for (int k = 0; k < count; ++k) rank += __shfl_sync(kAllLanes, position, k) < position;
    if (lane < count) members[rank] = position;
  }

  // Stores the positions of `count` samples of a multi-chunk class, those with the ranks from
  // `first` on, in batch order. Each lane finds one of them and holds the ranges of four tiles.
  __device__ void GatherRanks(int owner, int first, int count, int* members) const {
    const unsigned* const own =
        p_.tile_ranges + int64_t{__ldcg(&p_.multi_chunk_index[owner])} * kTiles;
    const uint4 four = __ldcg(reinterpret_cast<const uint4*>(own) + Lane());
    const int before = WarpExclusiveSum(
        static_cast<int>((four.x >> 16) + (four.y >> 16) + (four.z >> 16) + (four.w >> 16)));
    int rank = first + min(Lane(), count - 1);
    int lane = 0;  // binary search: the last lane with before <= rank
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      if (__shfl_sync(kAllLanes, before, lane + step) <= rank) lane += step;
    }
    rank -= __shfl_sync(kAllLanes, before, lane);  // from here on, among the samples in its tiles
    const unsigned ranges[] = {
        __shfl_sync(kAllLanes, four.x, lane), __shfl_sync(kAllLanes, four.y, lane),
        __shfl_sync(kAllLanes, four.z, lane), __shfl_sync(kAllLanes, four.w, lane)};
    // Walk through the four tiles to the one that has the rank. Of a range, the upper half is the
    // number of samples and the lower half their first place.
    int at = 0;
    bool found = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int here = static_cast<int>(ranges[e] >> 16);
      if (!found) at = (4 * lane + e) * p_.TileSize() + static_cast<int>(ranges[e] & 0xffff) + rank;
      found = found || rank < here;
      if (!found) rank -= here;
    }
    if (Lane() < count) members[Lane()] = __ldcg(&p_.tile_order[at]);
  }

  // Assigns an index to the owner's class and clears its entries for all tiles.
  __device__ void AddMultiChunkClass(int owner) {
    const int index = atomicAdd(&counters_->multi_chunk_classes.value, 1);
    p_.multi_chunk_index[owner] = index;
    uint4* const ranges = reinterpret_cast<uint4*>(p_.tile_ranges + int64_t{index} * kTiles);
    for (int k = 0; k < kTiles / 4; ++k) ranges[k] = uint4{0, 0, 0, 0};
  }

  // Finds the place of sample i in its tile, sorted by owner and position, by comparing it with all
  // samples of the tile: it counts the samples of classes with a smaller owner, and the earlier
  // samples of its own class. The first sample of a class in the tile stores the range of the
  // class: the number of its samples in the tile and their first place (tile_ranges).
  __device__ void PlaceInTile(int i, int owner) {
    const int size = p_.TileSize();
    const int tile = i / size, begin = tile * size, end = min(begin + size, p_.batch);
    int smaller = 0, same = 0, before = 0;
    // Four owners in one load: a tile's size is a multiple of four, and the array is padded.
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
    const int index = __ldcg(&p_.multi_chunk_index[owner]);
    p_.tile_ranges[int64_t{index} * kTiles + tile] =
        static_cast<unsigned>(same) << 16 | static_cast<unsigned>(smaller);
  }

  const Parameters<Feature>& p_;
  Counters* counters_;
  unsigned long long* table_;
  int* duplicates_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_HASHED_LABELS_CUH_
