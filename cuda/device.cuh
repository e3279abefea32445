// Device functions that all kernels share: rows of a matrix in the registers of a warp, sums over
// the lanes of a warp, grid barriers, flag-and-value mailboxes, arrival counters.
//
// The emulator (tests/emulator) compiles the same source for the host, with its own version of
// CUDA's runtime header. So the code uses CUDA's intrinsics, and inline PTX where there is none,
// and not CUB or libcu++, whose headers the emulator would have to replace too.

#ifndef TF_CENTER_LOSS_OP_CUDA_DEVICE_CUH_
#define TF_CENTER_LOSS_OP_CUDA_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/numeric_types.h"

// The dynamic shared memory of the block, of the size that the launch configuration requests.
#if !defined(TCL_DYNAMIC_SHARED)
#define TCL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// In the emulator, TCL_RELEASE makes the next access a release and TCL_ACQUIRE makes the last
// access an acquire. nvcc's host pass parses the names only.
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

// A warp reads a row in passes of kColumns columns, kPerLane of them in each lane: 64 bytes, 32
// bytes of double, or 16 bytes of unaligned rows (Width 1), where every number needs an address.
// With these sizes HashStep needs at most 128 registers and no spills, so that two blocks of 256
// threads fit on a multiprocessor.
template <typename Center, int Width>
constexpr int kPerLane = (Width == 1            ? 16
                          : sizeof(Center) == 8 ? 32
                                                : 64) /
                         static_cast<int>(sizeof(Center));
template <typename Center, int Width>
constexpr int kColumns = kWarp * kPerLane<Center, Width>;

enum class Cache {
  kNormal,
  kStreamed,     // used once in the launch: evict first
  kL2,           // other multiprocessors wrote the data in this launch, and L1 is not coherent
  kSpeculative,  // another warp may write the data now; the caller then discards the value
};

// The type that moves Width numbers in one access: 16 bytes, or 8 bytes for 16-bit numbers. Width 1
// moves a single number.
template <int Width, typename T>
using Vector =
    std::conditional_t<Width != 1, std::conditional_t<Width * sizeof(T) == 16, uint4, uint2>,
                       std::conditional_t<sizeof(T) == 2, unsigned short, T>>;

template <int Width, Cache cache, typename T>
__device__ __forceinline__ void LoadVector(const T* address, CenterType<T>* out) {
  using Bytes = Vector<Width, T>;
  static_assert(sizeof(Bytes) == Width * sizeof(T), "a vector is one access");
  const Bytes* const from = reinterpret_cast<const Bytes*>(address);
  Bytes bytes;
  if constexpr (cache == Cache::kNormal) bytes = *from;
  if constexpr (cache == Cache::kStreamed) bytes = __ldcs(from);
  if constexpr (cache == Cache::kL2) bytes = __ldcg(from);
  if constexpr (cache == Cache::kSpeculative) bytes = __ldca(from);
  T numbers[Width];
  memcpy(numbers, &bytes, sizeof(bytes));
#pragma unroll
  for (int e = 0; e < Width; ++e) out[e] = Widen(numbers[e]);
}

template <int Width, Cache cache, typename T>
__device__ __forceinline__ void StoreVector(T* address, const T* in) {
  using Bytes = Vector<Width, T>;
  static_assert(sizeof(Bytes) == Width * sizeof(T), "a vector is one access");
  Bytes bytes;
  memcpy(&bytes, in, sizeof(bytes));
  Bytes* const to = reinterpret_cast<Bytes*>(address);
  if constexpr (cache == Cache::kStreamed) __stcs(to, bytes);
  if constexpr (cache == Cache::kNormal) __stwb(to, bytes);
}

// Adds each of Width numbers atomically, in one instruction where the device has one.
template <int Width, typename T>
__device__ __forceinline__ void AddVector(T* address, const T* in) {
#pragma unroll
  for (int e = 0; e < Width; ++e) atomicAdd(address + e, in[e]);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <>
__device__ __forceinline__ void AddVector<4>(float* address, const float* in) {
  atomicAdd(reinterpret_cast<float4*>(address), float4{in[0], in[1], in[2], in[3]});
}
#endif

// The first column of this lane's vector `vector` in the pass that starts at `column`.
template <int Width>
__device__ __forceinline__ int64_t ColumnOf(int64_t column, int vector) {
  return column + (static_cast<int64_t>(vector) * kWarp + Lane()) * Width;
}

// Loads this lane's numbers of one pass, zeros beyond the end of the row. Width divides D, so a
// vector lies entirely inside or entirely outside the row.
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

// The sum over the lanes, in every lane. The butterfly fixes the order of the additions, so sums of
// floating-point numbers have reproducible bits. (CUB and cooperative groups specify no order.)
template <typename T>
__device__ __forceinline__ T WarpSum(T value) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, other);
  }
  return value;
}
__device__ __forceinline__ int WarpSum(int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, value);  // the order does not matter for int
#else
  return WarpSum<int>(value);
#endif
}

// The sums over the lanes of Count values each (a power of two): lane l gets the sum of
// values[l % Count]. A lane passes on half of its values in each step, so that all sums together
// take fewer than kWarp shuffles. CUB has no such function.
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

// The sum over the lower lanes. (cub::WarpScan would save 33 to 77 instructions in HashStep, about
// 1 %, nvcc 13.0 for sm_90. The emulator would then need a version of CUB's header.)
__device__ __forceinline__ int WarpExclusiveSum(int value) {
  const int lane = Lane();
  int sum = value;
#pragma unroll
  for (int other = 1; other < kWarp; other *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, other);
    if (lane >= other) sum += before;
  }
  return sum - value;
}

// Relaxed loads and stores at device scope, for numbers that other threads access concurrently. The
// atomic operations below are inline PTX too, because cuda::atomic_ref takes more instructions (12
// to 64 in each kernel, nvcc 13.0 for sm_90).
template <typename T>
__device__ __forceinline__ T LoadRelaxed(const T* number) {
#if defined(__CUDA_ARCH__)
  T value;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(number) : "memory");
  } else {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(number) : "memory");
  }
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

// If the load reads a released value, the writes before that release are visible after the load.
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

// The pause between two polls, which leaves the memory to other warps.
__device__ __forceinline__ void Sleep(int nanoseconds) {
  __nanosleep(static_cast<unsigned>(nanoseconds));
}

// Programmatic dependent launch (sm_90): with CudaTuning::overlap the blocks of this launch may be
// scheduled while the previous launch drains. They wait for its end before they access memory.
__device__ __forceinline__ void OverlapLaunches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
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

// A grid barrier in two halves, so that a block can work between them: it arrives at a counter,
// then waits until all blocks have arrived. All blocks must be resident (a cooperative launch).
// grid_group::barrier_arrive() and barrier_wait() of cooperative groups do the same, with 54 to 107
// more instructions for one barrier (nvcc 13.0 for sm_90) and without a pause between polls.
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

__device__ __forceinline__ void WaitForBlocks(const int* counter, int blocks, int wait_ns) {
  if (threadIdx.x == 0) {
    while (LoadRelaxed(counter) < blocks) Sleep(wait_ns);
    LoadAcquire(counter);
  }
  __syncthreads();
}

// A flag-and-value mailbox (NCCL's LL protocol): one thread publishes a number, another thread
// polls for it. Each 8-byte word carries a flag and 32 bits of the number in one access, so no
// fence is needed. An empty mailbox is all zero.
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

// Reads the number. Returns false while the mailbox is empty.
template <typename T>
__device__ __forceinline__ bool Poll(const Mailbox<T>* mailbox, T* number) {
  uint32_t halves[sizeof(T) / sizeof(uint32_t)];
  bool full = true;
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    const uint64_t word = LoadRelaxed(&mailbox->words[k]);
    halves[k] = static_cast<uint32_t>(word >> 32);
    full = full && (word & 1) != 0;
  }
  memcpy(number, halves, sizeof(T));
  return full;
}

template <typename T>
__device__ __forceinline__ void Empty(Mailbox<T>* mailbox) {
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / sizeof(uint32_t); ++k) {
    StoreRelaxed(&mailbox->words[k], uint64_t{0});
  }
}

// An arrival counter: the number of arrivals in the lower half, the sum of a number that the
// arrivals bring in the upper half.
using Arrivals = unsigned long long;
constexpr Arrivals kOneArrival = 1, kOneSummed = Arrivals{1} << 32;

// Adds to the counter and returns its value before. Releases the writes of this thread and acquires
// the writes of those that arrived earlier.
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

// Arrives once for the whole warp. Returns whether the warp is the last to arrive of `arrivals`. If
// so, `sum` becomes the total over the arrivals, the writes of the other warps are visible to all
// lanes, and the counter is zero again, ready for the next launch.
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
