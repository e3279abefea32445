// The emulator's version of CUDA's header of this name: the part of CUDA that cuda/ uses, so that a
// C++ compiler can compile cuda/center_loss.cu for the host. emulator.cc implements it.
//
// Every thread of a launch is a fiber, and one fiber runs at a time. At barriers, warp functions,
// atomics, releases, acquires and L2 accesses (__ldcg, __stcg), the scheduler may switch to another
// fiber, chosen by the seed. Memory is sequentially consistent, so the results do not show a
// missing release or acquire; the race check (emulator.cc) finds it.

#ifndef TF_CENTER_LOSS_OP_TESTS_EMULATOR_CUDA_RUNTIME_H_
#define TF_CENTER_LOSS_OP_TESTS_EMULATOR_CUDA_RUNTIME_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __nanosleep(nanoseconds) ::emulator::Spin()
#define __syncthreads() ::emulator::SyncThreads(__FILE__, __LINE__)
#define __syncthreads_or(vote) ::emulator::SyncThreadsOr(vote, __FILE__, __LINE__)
#define __syncwarp() ::emulator::SyncWarp(__FILE__, __LINE__)
#define TCL_RELEASE() ::emulator::Release(__FILE__, __LINE__)
#define TCL_ACQUIRE() ::emulator::Acquire(__FILE__, __LINE__)
#define TCL_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::SharedMemory()

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};

namespace emulator {

constexpr int kWarp = 32;

void SyncThreads(const char* file, int line);
int SyncThreadsOr(int vote, const char* file, int line);
void SyncWarp(const char* file, int line);
void Release(const char* file, int line);
void Acquire(const char* file, int line);
void Spin();  // yields until another thread has written
// Called before each synchronizing access: an atomic, or an L2 load or store.
void Synchronizing(const void* address, size_t size, bool reads, bool writes, const void* code);
unsigned char* SharedMemory();

// Waits until all lanes of the warp have called it; returns the bits that each of them passed. With
// `orders`, it also orders their memory accesses.
const uint64_t* Exchange(const char* what, uint64_t bits, bool orders = false);
int Lane();

int Launch(unsigned grid, unsigned block, size_t shared, bool cooperative,
           const std::function<void()>& body);

template <typename T>
uint64_t BitsOf(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T FromBits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

// Of the thread that is running.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

// Keeps -fsanitize=thread from reporting a synchronizing access as a plain one.
#define TCL_SYNCHRONIZING __attribute__((no_sanitize("thread")))

template <typename T>
TCL_SYNCHRONIZING T __ldcg(const T* address) {
  ::emulator::Synchronizing(address, sizeof(T), true, false, __builtin_return_address(0));
  return *address;
}
template <typename T>
TCL_SYNCHRONIZING void __stcg(T* address, T value) {
  ::emulator::Synchronizing(address, sizeof(T), false, true, __builtin_return_address(0));
  *address = value;
}
// Not checked for races: cuda/ uses it for speculative loads only (Cache::kSpeculative).
template <typename T>
TCL_SYNCHRONIZING T __ldca(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <typename T>
TCL_SYNCHRONIZING T atomicAdd(T* address, T value) {
  ::emulator::Synchronizing(address, sizeof(T), true, true, __builtin_return_address(0));
  const T before = *address;
  *address = before + value;
  return before;
}
template <typename T>
TCL_SYNCHRONIZING T atomicCAS(T* address, T expected, T value) {
  ::emulator::Synchronizing(address, sizeof(T), true, true, __builtin_return_address(0));
  const T before = *address;
  if (before == expected) *address = value;
  return before;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  const uint64_t* all = ::emulator::Exchange("__shfl_sync", ::emulator::BitsOf(value));
  return ::emulator::FromBits<T>(all[lane % ::emulator::kWarp]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const uint64_t* all = ::emulator::Exchange("__shfl_xor_sync", ::emulator::BitsOf(value));
  return ::emulator::FromBits<T>(all[::emulator::Lane() ^ mask]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const uint64_t* all = ::emulator::Exchange("__shfl_up_sync", ::emulator::BitsOf(value));
  const int lane = ::emulator::Lane();
  return ::emulator::FromBits<T>(all[lane >= delta ? lane - delta : lane]);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* all = ::emulator::Exchange("__ballot_sync", vote);
  unsigned votes = 0;
  for (int lane = 0; lane < ::emulator::kWarp; ++lane) votes |= unsigned(all[lane] != 0) << lane;
  return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t* all = ::emulator::Exchange("__match_any_sync", ::emulator::BitsOf(value));
  unsigned same = 0;
  for (int lane = 0; lane < ::emulator::kWarp; ++lane) {
    same |= unsigned(all[lane] == ::emulator::BitsOf(value)) << lane;
  }
  return same;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = ::operator new(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  ::operator delete(memory);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t error);

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               const Actual&... arguments) {
  bool cooperative = false;
  for (unsigned k = 0; k < config->numAttrs; ++k) cooperative |= config->attrs[k].val.cooperative;
  return static_cast<cudaError_t>(::emulator::Launch(config->gridDim.x, config->blockDim.x,
                                                     config->dynamicSmemBytes, cooperative,
                                                     [&] { kernel(arguments...); }));
}

#endif  // TF_CENTER_LOSS_OP_TESTS_EMULATOR_CUDA_RUNTIME_H_
