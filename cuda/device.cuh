// What the kernels are made of: rows in registers, warp sums, grid barriers, flag-and-value
// mailboxes, arrival counters.

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

// The emulator compiles these files for the host. There TCL_RELEASE stands for a release by the
// next access and TCL_ACQUIRE for an acquire by the last one. nvcc's host pass only needs the
// names.
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

// A warp does kColumns columns of a row in one pass, kPerLane of them in each lane: 64 bytes, or 32
// where a number takes two registers, or 16 where each has its own address. That leaves room for
// two blocks of 256 threads on a multiprocessor.
template <typename Center, int Width>
constexpr int kPerLane = (Width == 1            ? 16
                          : sizeof(Center) == 8 ? 32
                                                : 64) /
                         static_cast<int>(sizeof(Center));
template <typename Center, int Width>
constexpr int kColumns = kWarp * kPerLane<Center, Width>;

enum class Cache {
  kNormal,
  kStreamed,  // read or written once: evicted first
  kShared,    // written by other multiprocessors during this launch: past the first-level cache
  kEarly,     // read before it is known whether another warp writes it; then the value is not used
};

template <typename T>
using Word = std::conditional_t<sizeof(T) == 2, unsigned short, T>;

template <Cache cache, typename T>
__device__ __forceinline__ T LoadWord(const T* address) {
  if constexpr (cache == Cache::kStreamed) return __ldcs(address);
  if constexpr (cache == Cache::kShared) return __ldcg(address);
  if constexpr (cache == Cache::kEarly) return __ldca(address);
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

// The sum over the lanes, the same in each of them, always added in the same order.
// (cub::WarpReduce leaves it in one lane, in an order that cub does not promise.)
template <typename T>
__device__ __forceinline__ T WarpSum(T value) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, other);
  }
  return value;
}

// The sums over the lanes of several values, a power of two: lane l gets that of values[l % Count].
// In each step a lane hands on half of what it holds, so that takes no more than kWarp shuffles.
template <typename T, int Count>
__device__ __forceinline__ T WarpSums(T (&values)[Count]) {
#pragma unroll
  for (int n = Count / 2; n > 0; n /= 2) {
    const bool upper = (Lane() & n) != 0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const T kept = upper ? values[k + n] : values[k];
      const T given = upper ? values[k] : values[k + n];
      values[k] = kept + __shfl_xor_sync(kAllLanes, given, n);
    }
  }
  T sum = values[0];
#pragma unroll
  for (int other = Count; other < kWarp; other *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, other);
  }
  return sum;
}

// The sum over the lanes before this one.
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

// Relaxed loads and stores at device scope: other threads may access the number at the same time.
// (cuda::atomic_ref says the same; the emulator would need a copy of that header.)
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

// An acquire load: what was written before the number was released is visible after it.
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

__device__ __forceinline__ void Sleep(int nanoseconds) {
  __nanosleep(static_cast<unsigned>(nanoseconds));
}

// Programmatic dependent launch (sm_90): with CudaTuning::overlap a launch may be set up while the
// one before it ends. It touches no memory before it has waited for that one.
__device__ __forceinline__ void OverlapLaunches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint64_t Nanoseconds() {
#if defined(__CUDA_ARCH__)
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
#else
  static uint64_t time = 0;
  return time += 1000;
#endif
}

// A grid barrier in two halves, so that work fits between them: a block arrives, then waits until
// all blocks have arrived. All blocks must be resident (a cooperative launch).
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

__device__ __forceinline__ void Await(const int* counter, int arrivals, int wait_ns) {
  while (LoadRelaxed(counter) < arrivals) Sleep(wait_ns);
  LoadAcquire(counter);
}

__device__ __forceinline__ void WaitAsBlock(const int* counter, int arrivals, int wait_ns) {
  if (threadIdx.x == 0) Await(counter, arrivals, wait_ns);
  __syncthreads();
}

// A flag-and-value mailbox (NCCL's LL protocol): one thread publishes a number, another polls for
// it, and no fence is needed, because a flag and 32 bits of the value travel in one 8-byte access.
// All zero: empty.
template <typename T>
struct Mailbox {
  uint64_t words[sizeof(T) / sizeof(uint32_t)];
};

template <typename T>
__device__ __forceinline__ void Publish(Mailbox<T>* mailbox, T number) {
  uint32_t halves[sizeof(T) / sizeof(uint32_t)];
  memcpy(halves, &number, sizeof(T));
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    StoreRelaxed(&mailbox->words[k], uint64_t{halves[k]} << 32 | 1);
  }
}

// Reads the number; false while there is none.
template <typename T>
__device__ __forceinline__ bool Poll(const Mailbox<T>* mailbox, T* number) {
  uint32_t halves[sizeof(T) / sizeof(uint32_t)];
  bool there = true;
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    const uint64_t word = LoadRelaxed(&mailbox->words[k]);
    halves[k] = static_cast<uint32_t>(word >> 32);
    there = there && (word & 1) != 0;
  }
  memcpy(number, halves, sizeof(T));
  return there;
}

template <typename T>
__device__ __forceinline__ void Empty(Mailbox<T>* mailbox) {
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    StoreRelaxed(&mailbox->words[k], uint64_t{0});
  }
}

// Arrivals at a node, in the lower half, and in the upper half a number that is summed up.
using Arrivals = unsigned long long;
constexpr Arrivals kOneArrival = 1, kOneSummed = Arrivals{1} << 32;

// Adds to a counter and returns what was there before. Acquires what others wrote before they
// arrived, and releases what this thread wrote.
__device__ __forceinline__ Arrivals Arrive(Arrivals* counter, Arrivals arrival) {
#if defined(__CUDA_ARCH__)
  Arrivals before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(arrival)
               : "memory");
#else
  TCL_RELEASE();
  const Arrivals before = atomicAdd(counter, arrival);
  TCL_ACQUIRE();
#endif
  return before;
}

// Arrives for this warp. Returns whether it is the last of `arrivals`; the counter is then zero
// again and `sum` is of all of them. What the other warps wrote before is then visible to this one.
__device__ __forceinline__ bool LastWarpToArrive(Arrivals* counter, int arrivals, int* sum) {
  __syncwarp();  // orders the other lanes' writes before the arrival
  bool last = false;
  int all = 0;
  if (Lane() == 0) {
    const Arrivals now = Arrive(counter, kOneArrival + *sum * kOneSummed) + kOneArrival;
    last = static_cast<int>(now & 0xffffffff) == arrivals;
    all = *sum + static_cast<int>(now >> 32);
    if (last) *counter = 0;
  }
  __syncwarp();  // orders the arrival before the other lanes' reads: a vote orders no memory
  *sum = __shfl_sync(kAllLanes, all, 0);
  return __any_sync(kAllLanes, last);
}

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_DEVICE_CUH_
