// Rows in registers, sums over a warp, counters that blocks of one launch meet at, and boxes in
// which one hands a number to another.

#ifndef TF_CENTER_LOSS_OP_CUDA_DEVICE_CUH_
#define TF_CENTER_LOSS_OP_CUDA_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/numeric_types.h"

// Shared memory of the size that the launch asked for.
#if !defined(TCL_DYNAMIC_SHARED)
#define TCL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// Where the emulator compiles these files for the host, these stand for what instructions below
// release by the access that comes next, and acquire by the one that came last; nvcc's pass over
// the host code needs the names alone.
#if !defined(__CUDA_ARCH__) && !defined(TCL_RELEASE)
#define TCL_RELEASE()
#define TCL_ACQUIRE()
#endif

namespace tcl {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int WarpOfBlock() { return static_cast<int>(threadIdx.x) / kWarp; }

// A warp holds up to kColumns of a row at a time, kPerLane of them in each lane: 64 bytes, which is
// enough loads in flight to hide the latency of memory, and few enough registers (row, next row,
// center and sum) for two blocks of 256 threads on a multiprocessor. Half of that where the numbers
// come one by one, since each then has an address of its own, and three quarters where they are
// pairs of float64, whose counts and scales take pairs of registers, too.
template <typename Center, int Width>
constexpr int kPerLane = (Width == 1            ? 32
                          : sizeof(Center) == 8 ? 48
                                                : 64) /
                         static_cast<int>(sizeof(Center));
template <typename Center, int Width>
constexpr int kColumns = kWarp * kPerLane<Center, Width>;

// kStreamed: read or written once, not worth a place in the caches. kShared: written by other
// multiprocessors during this launch, so the first-level cache, which may be stale, is passed by.
enum class Cache { kNormal, kStreamed, kShared };

template <typename T>
using Word = std::conditional_t<sizeof(T) == 2, unsigned short, T>;

template <Cache cache, typename T>
__device__ __forceinline__ T LoadWord(const T* address) {
  if constexpr (cache == Cache::kStreamed) return __ldcs(address);
  if constexpr (cache == Cache::kShared) return __ldcg(address);
  return *address;
}

template <Cache cache, typename T>
__device__ __forceinline__ void StoreWord(T* address, T value) {
  if constexpr (cache == Cache::kStreamed) {
    __stcs(address, value);
  } else {
    __stwb(address, value);
  }
}

// Width numbers in one access: 16 bytes, or 8 where the numbers have 16 bits.
template <int Width, typename T>
using Vector = std::conditional_t<Width * sizeof(T) == 16, uint4, uint2>;

template <int Width, Cache cache, typename T>
__device__ __forceinline__ void LoadVector(const T* address, CenterType<T>* out) {
  using Bytes = std::conditional_t<Width == 1, Word<T>, Vector<Width, T>>;
  static_assert(sizeof(Bytes) == Width * sizeof(T), "one access for one vector");
  const Bytes bytes = LoadWord<cache>(reinterpret_cast<const Bytes*>(address));
  T numbers[Width];
  memcpy(numbers, &bytes, sizeof(bytes));
#pragma unroll
  for (int e = 0; e < Width; ++e) out[e] = Widen(numbers[e]);
}

template <int Width, Cache cache, typename T>
__device__ __forceinline__ void StoreVector(T* address, const T* in) {
  using Bytes = std::conditional_t<Width == 1, Word<T>, Vector<Width, T>>;
  static_assert(sizeof(Bytes) == Width * sizeof(T), "one access for one vector");
  Bytes bytes;
  memcpy(&bytes, in, sizeof(bytes));
  StoreWord<cache>(reinterpret_cast<Bytes*>(address), bytes);
}

template <int Count, typename T>
__device__ __forceinline__ void AddOneByOne(T* address, const T* in) {
#pragma unroll
  for (int e = 0; e < Count; ++e) atomicAdd(address + e, in[e]);
}

__device__ __forceinline__ void AddFour(float* address, const float* in) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(address), float4{in[0], in[1], in[2], in[3]});
#else
  AddOneByOne<4>(address, in);
#endif
}

// Adds Width numbers at `address`, each atomically, in one access where the device can.
template <int Width, typename T>
__device__ __forceinline__ void AddVector(T* address, const T* in) {
  if constexpr (Width == 4 && std::is_same_v<T, float>) {
    AddFour(address, in);
  } else {
    AddOneByOne<Width>(address, in);
  }
}

// The first column of this lane's vector number `vector` of the columns that start at `column`.
template <int Width>
__device__ __forceinline__ int64_t ColumnOf(int64_t column, int vector) {
  const int lane = Lane();
  return column + (static_cast<int64_t>(vector) * kWarp + lane) * Width;
}

// This lane's share of kColumns of a row of D numbers; zeros beyond its end. Width divides D, so a
// vector lies in the row or beyond it.
template <int Width, Cache cache, typename T>
__device__ __forceinline__ void LoadRow(const T* row, int64_t column, int64_t dim,
                                        CenterType<T> (&out)[kPerLane<CenterType<T>, Width>]) {
#pragma unroll
  for (int v = 0; v < kPerLane<CenterType<T>, Width> / Width; ++v) {
    const int64_t at = ColumnOf<Width>(column, v);
    if (at < dim) {
      LoadVector<Width, cache>(row + at, out + v * Width);
    } else {
#pragma unroll
      for (int e = 0; e < Width; ++e) out[v * Width + e] = 0;
    }
  }
}

template <int Width, Cache cache, typename T>
__device__ __forceinline__ void StoreRow(T* row, int64_t column, int64_t dim,
                                         const T (&in)[kPerLane<CenterType<T>, Width>]) {
#pragma unroll
  for (int v = 0; v < kPerLane<CenterType<T>, Width> / Width; ++v) {
    const int64_t at = ColumnOf<Width>(column, v);
    if (at < dim) StoreVector<Width, cache>(row + at, in + v * Width);
  }
}

// Asks for a row of D numbers to be brought into the second-level cache; of a long one for as much
// as there are lanes, since the cache has to hold that of all warps.
template <typename T>
__device__ __forceinline__ void PrefetchRow(const T* row, int64_t dim) {
  constexpr int kLine = 128;
  const int64_t at = int64_t{Lane()} * kLine;
  if (at >= dim * static_cast<int64_t>(sizeof(T))) return;
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(row) + at));
#else
  (void)row;
#endif
}

// The sum over the lanes, the same in each of them, always added in the same order.
template <typename T>
__device__ __forceinline__ T WarpSum(T value) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, other);
  }
  return value;
}

// The same of several values, side by side: a shuffle takes its time, and hardly any other's.
template <typename T, int Count>
__device__ __forceinline__ void WarpSums(T (&values)[Count]) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
#pragma unroll
    for (int k = 0; k < Count; ++k) values[k] += __shfl_xor_sync(kAllLanes, values[k], other);
  }
}

// For the lane, the sum over the lanes before it.
__device__ __forceinline__ int WarpSumBefore(int value) {
  const int lane = Lane();
  int sum = value;
#pragma unroll
  for (int other = 1; other < kWarp; other *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, other);
    if (lane >= other) sum += before;
  }
  return sum - value;
}

// A number that others may read or change meanwhile.
__device__ __forceinline__ int LoadRelaxed(const int* number) {
#if defined(__CUDA_ARCH__)
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(number) : "memory");
  return value;
#else
  return __ldcg(number);
#endif
}

__device__ __forceinline__ uint64_t LoadRelaxed(const uint64_t* number) {
#if defined(__CUDA_ARCH__)
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(number) : "memory");
  return value;
#else
  return __ldcg(number);
#endif
}

__device__ __forceinline__ void StoreRelaxed(uint64_t* number, uint64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(number), "l"(value) : "memory");
#else
  __stcg(number, value);
#endif
}

// As LoadRelaxed, and what was written before that number was released is visible behind this.
__device__ __forceinline__ int LoadAcquire(const int* number) {
#if defined(__CUDA_ARCH__)
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(number) : "memory");
#else
  const int value = __ldcg(number);
  TCL_ACQUIRE();
#endif
  return value;
}

// Blocks of one launch that meet. ArriveBlock: what the block has written is visible to whoever has
// waited for it. Only for launches whose blocks are all resident (cooperative launches).
__device__ __forceinline__ void ArriveBlock(int* counter) {
  __syncthreads();
  if (threadIdx.x != 0) return;
#if defined(__CUDA_ARCH__)
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
#else
  TCL_RELEASE();
  atomicAdd(counter, 1);
#endif
}

__device__ __forceinline__ void Await(const int* counter, int arrivals) {
  while (LoadRelaxed(counter) < arrivals) __nanosleep(64);
  LoadAcquire(counter);
}

__device__ __forceinline__ void WaitAsBlock(const int* counter, int arrivals) {
  if (threadIdx.x == 0) Await(counter, arrivals);
  __syncthreads();
}

__device__ __forceinline__ void WaitAsWarp(const int* counter, int arrivals) {
  if (Lane() == 0) Await(counter, arrivals);
  __syncwarp();
}

// A number that one thread hands to another, and that alone: whatever else it has written may yet
// be on its way, so nobody waits for that. Every 32 bits of it lie in a word with one that says
// they are there, and one access brings both. All zero: empty.
template <typename T>
struct Box {
  uint64_t words[sizeof(T) / sizeof(uint32_t)];
};

template <typename T>
__device__ __forceinline__ void Fill(Box<T>* box, T number) {
  uint32_t halves[sizeof(T) / sizeof(uint32_t)];
  memcpy(halves, &number, sizeof(T));
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    StoreRelaxed(&box->words[k], uint64_t{halves[k]} << 32 | 1);
  }
}

// Whether there is a number in the box, and which.
template <typename T>
__device__ __forceinline__ bool LookInto(const Box<T>* box, T* number) {
  uint32_t halves[sizeof(T) / sizeof(uint32_t)];
  bool there = true;
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    const uint64_t word = LoadRelaxed(&box->words[k]);
    halves[k] = static_cast<uint32_t>(word >> 32);
    there = there && (word & 1) != 0;
  }
  memcpy(number, halves, sizeof(T));
  return there;
}

template <typename T>
__device__ __forceinline__ void Empty(Box<T>* box) {
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    StoreRelaxed(&box->words[k], uint64_t{0});
  }
}

// Adds one; returns how many came before. What those wrote is visible to this thread, and what it
// wrote to those who come later.
__device__ __forceinline__ int CountArrival(int* counter) {
#if defined(__CUDA_ARCH__)
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
#else
  TCL_RELEASE();
  const int before = atomicAdd(counter, 1);
  TCL_ACQUIRE();
#endif
  return before;
}

// At which of the counters that the lanes name this warp is the last of so many, as bits by lane;
// those are then zero again. What the others wrote before they came is visible to it.
__device__ __forceinline__ unsigned LastAt(int* counter, int arrivals) {
  __syncwarp();  // what the other lanes did comes before the arrivals
  bool last = false;
  if (counter != nullptr) {
    last = arrivals == 1 || CountArrival(counter) == arrivals - 1;
    if (last) *counter = 0;
  }
  __syncwarp();  // and what they will read comes after them: a vote orders no memory
  return __ballot_sync(kAllLanes, last);
}

__device__ __forceinline__ bool LastWarpToArrive(int* counter, int arrivals) {
  return LastAt(Lane() == 0 ? counter : nullptr, arrivals) != 0;
}

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_DEVICE_CUH_
