// The emulator of CUDA launches: fibers, their scheduler, barriers and warp functions, and the race
// check. cuda_runtime.h declares what the kernels call.
//
// The race check needs kernels compiled with -fsanitize=thread. Its run-time library is not linked;
// this file defines the functions that the compiler calls at each access. Two accesses of different
// threads to the same memory, one of them a write, are an error unless the following order them, in
// whatever schedule. Vector clocks record that order:
//   __syncthreads, __syncwarp  order all accesses before against all accesses after
//   TCL_RELEASE                the thread's next synchronizing access carries its clock
//   TCL_ACQUIRE                joins the clock that the thread's last synchronizing access read
//   shuffles, votes            order nothing
// Synchronizing accesses are atomics and L2 loads and stores. They do not race with one another.

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

// AddressSanitizer must be told of every switch of stacks and supports swapcontext. Without it,
// longjmp switches stacks without a system call.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = size_t{128} << 10;
struct Settings {
  uint64_t seed = 0;
  int multiprocessors = 2;
  bool races = false;
  std::string skipped;  // "file:line" of a barrier, release or acquire that is left out
} settings;

using Clock = std::vector<uint32_t>;  // vector clock: an entry for each thread

struct Fiber;

struct Warp {
  std::vector<Fiber*> waiting;
  int exited = 0;
  int turn = 0;  // values are double-buffered: a lane may still read while others write the next
  const char* what = nullptr;
  uint64_t values[2][kWarp];
};

struct Block {
  std::vector<Fiber*> waiting;
  bool votes[3] = {};  // of the current turn, the previous and the next one
  int exited = 0;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

struct Fiber {
  dim3 thread, block;
  Block* in_block;
  Warp* in_warp;
  int lane;
  uint32_t number;
  Clock now;       // of this thread
  Clock released;  // carried by its next synchronizing write
  Clock read;      // read by its last synchronizing access
  unsigned char* stack;
  ucontext_t context;
  jmp_buf point;
  bool started = false;
  bool slow = false;
  unsigned votes = 0;  // turns of __syncthreads_or
  void* fake_stack = nullptr;
};

struct Access {
  uint32_t fiber, clock;
  bool synchronizing;  // whether it is a synchronizing access
  const void* code;
};

// The last accesses to four bytes of memory: the last write, and up to four reads since then that
// are not ordered with each other. A fifth read replaces one of them.
struct Cell {
  bool written = false;
  int reads = 0;
  Access write;
  Access read[4];
};

// The clock that synchronizing writes left at an address, and the thread of the last one.
struct Handed {
  Clock clock;
  const Fiber* last = nullptr;
};

struct Run {
  const std::function<void()>* body;
  std::unordered_map<uintptr_t, Cell> cells;
  std::unordered_map<uintptr_t, Handed> handed;
  unsigned grid, block;
  size_t shared;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::vector<Fiber*> spinning;  // fibers in Spin; woken after a write
  bool written = false;          // whether a write happened since all were woken
  size_t alive = 0;
  Fiber* fiber = nullptr;  // the running one
  ucontext_t scheduler;
  jmp_buf scheduler_point;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::mt19937_64 random;
  std::string error;
};

Run* run = nullptr;
std::string last_error;
std::vector<unsigned char*> stacks;

unsigned char* TakeStack() {
  if (stacks.empty()) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return static_cast<unsigned char*>(memory);
  }
  unsigned char* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

[[gnu::noinline]] void ToScheduler(bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  Fiber* const fiber = run->fiber;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fiber->fake_stack, run->scheduler_stack,
                                 run->scheduler_stack_bytes);
  swapcontext(&fiber->context, &run->scheduler);
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#else
  if (ends || _setjmp(run->fiber->point) == 0) _longjmp(run->scheduler_point, 1);
#endif
}

void FiberMain() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &run->scheduler_stack, &run->scheduler_stack_bytes);
#endif
  (*run->body)();
  Fiber* const fiber = run->fiber;
  ++fiber->in_block->exited;
  ++fiber->in_warp->exited;
  --run->alive;
  ToScheduler(true);
}

[[gnu::noinline]] void ToFiber(Fiber* fiber) {
  run->fiber = fiber;
  threadIdx = fiber->thread;
  blockIdx = fiber->block;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kStackBytes);
  swapcontext(&run->scheduler, &fiber->context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  if (_setjmp(run->scheduler_point) == 0) {
    if (fiber->started) _longjmp(fiber->point, 1);
    fiber->started = true;
    setcontext(&fiber->context);
  }
#endif
}

[[noreturn]] void Fail(const std::string& error) {
  run->error = error;
  for (;;) ToScheduler(false);
}

void Yield() {
  run->ready.push_back(run->fiber);
  ToScheduler(false);
}

void Join(Clock* clock, const Clock& other) {
  if (clock->empty()) *clock = other;
  for (size_t k = 0; k < other.size(); ++k) (*clock)[k] = std::max((*clock)[k], other[k]);
}

// Orders all accesses so far of the waiting fibers and the running one before their later accesses.
void Order(const std::vector<Fiber*>& waiting) {
  if (!settings.races) return;
  Clock all = run->fiber->now;
  for (Fiber* fiber : waiting) Join(&all, fiber->now);
  const auto go_on = [&all](Fiber* fiber) {
    fiber->now = all;
    ++fiber->now[fiber->number];
  };
  for (Fiber* fiber : waiting) go_on(fiber);
  go_on(run->fiber);
}

std::string Where(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  char text[32];
  snprintf(text, sizeof(text), "@%zx@",
           static_cast<size_t>(static_cast<const char*>(code) -
                               static_cast<const char*>(info.dli_fbase) - 1));
  return text;
}

void Check(const Access& before, const char* did, const Access& now, const char* does) {
  if (before.fiber == now.fiber || (before.synchronizing && now.synchronizing)) return;
  if (run->fiber->now[before.fiber] >= before.clock) return;
  const auto name = [](uint32_t fiber) {
    return "thread " + std::to_string(fiber % run->block) + " of block " +
           std::to_string(fiber / run->block);
  };
  Fail("race: " + name(now.fiber) + " " + does + " at " + Where(now.code) + " what " +
       name(before.fiber) + " " + did + " at " + Where(before.code));
}

void Note(const void* address, size_t size, bool writes, bool synchronizing, const void* code) {
  if (run == nullptr || run->fiber == nullptr || !settings.races) return;
  Fiber* const fiber = run->fiber;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin - reinterpret_cast<uintptr_t>(fiber->stack) < kStackBytes) return;
  const Access now = {fiber->number, fiber->now[fiber->number], synchronizing, code};
  for (uintptr_t at = begin / 4; at <= (begin + size - 1) / 4; ++at) {
    Cell& cell = run->cells[at];
    if (cell.written) Check(cell.write, "wrote", now, writes ? "writes" : "reads");
    if (writes) {
      for (int k = 0; k < cell.reads; ++k) Check(cell.read[k], "read", now, "writes");
      cell.written = true;
      cell.reads = 0;
      cell.write = now;
      continue;
    }
    int place = 0;
    while (place < cell.reads && fiber->now[cell.read[place].fiber] < cell.read[place].clock) {
      ++place;
    }
    if (place == 4) place = static_cast<int>(run->random() % 4);
    cell.read[place] = now;
    cell.reads = std::max(cell.reads, place + 1);
  }
}

// A barrier of `all` fibers. Returns true in the last one to arrive, which wakes the others.
bool Meet(std::vector<Fiber*>* waiting, size_t all) {
  if (waiting->size() + 1 < all) {
    waiting->push_back(run->fiber);
    ToScheduler(false);
    return false;
  }
  run->ready.insert(run->ready.end(), waiting->begin(), waiting->end());
  waiting->clear();
  return true;
}

void WakeSpinning() {
  run->ready.insert(run->ready.end(), run->spinning.begin(), run->spinning.end());
  run->spinning.clear();
}

bool Skipped(const char* file, int line) {
  if (settings.skipped.empty()) return false;
  const std::string path(file);
  const std::string name = path.substr(path.find_last_of('/') + 1);
  return settings.skipped == name + ":" + std::to_string(line);
}

void StartBlock(unsigned index) {
  auto block = std::make_unique<Block>();
  block->warps.resize(run->block / kWarp);
  block->shared.reset(new unsigned char[run->shared]);
  std::memset(block->shared.get(), 0xcd, run->shared);
  bool slow = false;
  for (unsigned t = 0; t < run->block; ++t) {
    // One schedule in four has warps that rarely run; another one has such threads.
    if (settings.seed % 4 == 1 && t % kWarp == 0) slow = run->random() % 4 == 0;
    if (settings.seed % 4 == 3) slow = run->random() % 64 == 0;
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = dim3(t, 0, 0);
    fiber->block = dim3(index, 0, 0);
    fiber->in_block = block.get();
    fiber->in_warp = &block->warps[t / kWarp];
    fiber->lane = static_cast<int>(t % kWarp);
    fiber->slow = slow;
    fiber->number = index * run->block + t;
    if (settings.races) {
      fiber->now.resize(run->grid * run->block);
      fiber->now[fiber->number] = 1;
    }
    fiber->stack = TakeStack();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, FiberMain, 0);
    run->ready.push_back(fiber.get());
    ++run->alive;
    run->fibers.push_back(std::move(fiber));
  }
  run->blocks.push_back(std::move(block));
}

size_t Pick() {
  const size_t ready = run->ready.size();
  if (settings.seed == 0) return 0;
  size_t picked;
  do {
    picked = run->random() % ready;
  } while (run->ready[picked]->slow && run->random() % 256 != 0);
  return picked;
}

}  // namespace

int Lane() { return run->fiber->lane; }

unsigned char* SharedMemory() { return run->fiber->in_block->shared.get(); }

void MayYield() {
  if (settings.seed != 0 && run->random() % 4 == 0) Yield();
}

void Release(const char* file, int line) {
  MayYield();
  if (Skipped(file, line) || !settings.races) return;
  Fiber* const fiber = run->fiber;
  fiber->released = fiber->now;
  ++fiber->now[fiber->number];
}

void Acquire(const char* file, int line) {
  MayYield();
  if (Skipped(file, line) || !settings.races) return;
  Join(&run->fiber->now, run->fiber->read);
}

void Synchronizing(const void* address, size_t size, bool reads, bool writes, const void* code) {
  MayYield();
  if (writes) {
    run->written = true;
    if (settings.seed != 0 && run->random() % 16 == 0) WakeSpinning();
  }
  if (!settings.races) return;
  Fiber* const fiber = run->fiber;
  Note(address, size, writes, true, code);
  const auto at = reinterpret_cast<uintptr_t>(address);
  Handed& handed = run->handed[at];
  if (reads) fiber->read = handed.clock;
  if (!writes) return;
  if (!reads) handed.clock.clear();  // a store replaces the earlier clock
  Join(&handed.clock, fiber->released);
  handed.last = fiber;
  fiber->released.clear();
}

void Plain(const void* address, size_t size, bool writes, const void* code) {
  if (run == nullptr || !settings.races) return;
  // The last thread to arrive at a counter may reset it by a plain store: no other access follows.
  bool synchronizing = false;
  if (writes && (size == 4 || size == 8)) {
    const auto handed = run->handed.find(reinterpret_cast<uintptr_t>(address));
    synchronizing = handed != run->handed.end() && handed->second.last == run->fiber;
  }
  Note(address, size, writes, synchronizing, code);
}

void Spin() {
  run->spinning.push_back(run->fiber);
  ToScheduler(false);
}

void SyncThreads(const char* file, int line) {
  if (Skipped(file, line)) return MayYield();
  Block* const block = run->fiber->in_block;
  if (block->exited > 0) Fail("a thread left its block before a barrier of the others");
  if (block->waiting.size() + 1 == run->block) Order(block->waiting);
  if (Meet(&block->waiting, run->block) && settings.seed != 0) Yield();
}

int SyncThreadsOr(int vote, const char* file, int line) {
  bool* const votes = run->fiber->in_block->votes;
  const unsigned turn = run->fiber->votes++;
  if (vote) votes[turn % 3] = true;
  SyncThreads(file, line);
  votes[(turn + 2) % 3] = false;
  return votes[turn % 3];
}

void SyncWarp(const char* file, int line) {
  if (Skipped(file, line)) return MayYield();
  Exchange("__syncwarp", 0, true);
}

const uint64_t* Exchange(const char* what, uint64_t bits, bool orders) {
  Warp* const warp = run->fiber->in_warp;
  if (warp->exited > 0) Fail(std::string("a lane left its warp before ") + what);
  if (warp->waiting.empty()) warp->what = what;
  if (std::strcmp(warp->what, what) != 0) {
    Fail(std::string("lanes of one warp meet in ") + warp->what + " and " + what);
  }
  uint64_t* const values = warp->values[warp->turn % 2];
  values[run->fiber->lane] = bits;
  if (warp->waiting.size() + 1 == kWarp) {
    ++warp->turn;
    if (orders) Order(warp->waiting);
  }
  if (Meet(&warp->waiting, kWarp) && settings.seed != 0) MayYield();
  return values;
}

int Launch(unsigned grid, unsigned block, size_t shared, bool cooperative,
           const std::function<void()>& body) {
  Run now;
  now.body = &body;
  now.grid = grid;
  now.block = block;
  now.shared = shared;
  now.random.seed(settings.seed);
  run = &now;
  blockDim = dim3(block);
  gridDim = dim3(grid);
  // A cooperative launch has all blocks resident; another launch two at a time, in random order.
  std::vector<unsigned> waiting(grid);
  for (unsigned k = 0; k < grid; ++k) waiting[k] = grid - 1 - k;
  if (settings.seed != 0) std::shuffle(waiting.begin(), waiting.end(), now.random);
  const size_t resident = cooperative ? grid : 2;
  const auto start_blocks = [&] {
    while (!waiting.empty() && now.alive + block <= resident * block) {
      StartBlock(waiting.back());
      waiting.pop_back();
    }
  };
  start_blocks();
  while (!now.ready.empty() && now.error.empty()) {
    const size_t picked = Pick();
    Fiber* const fiber = now.ready[picked];
    if (settings.seed == 0) {
      now.ready.erase(now.ready.begin());
    } else {
      now.ready[picked] = now.ready.back();
      now.ready.pop_back();
    }
    ToFiber(fiber);
    start_blocks();
    if (now.ready.empty() && now.written) {
      now.written = false;
      WakeSpinning();
    }
  }
  if (now.error.empty() && now.alive > 0) now.error = "deadlock: every thread waits";
  for (auto& fiber : now.fibers) stacks.push_back(fiber->stack);
  run = nullptr;
  last_error = now.error;
  return now.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::settings.multiprocessors;  // the launcher caches the count for each device
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::settings.multiprocessors;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::last_error.c_str()
         : error == cudaSuccess          ? "no error"
                                         : "invalid argument";
}

// With seed 0 the threads run in order, otherwise in random order; odd seeds slow some threads
// down. `races` enables the race check. `skipped` is a barrier, release or acquire to leave out.
extern "C" void tcl_emulator_configure(uint64_t seed, int multiprocessors, bool races,
                                       const char* skipped) {
  emulator::settings = {seed, multiprocessors, races, skipped};
}

// The functions that -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void* __tsan_memcpy(void* to, const void* from, size_t size) { return std::memcpy(to, from, size); }
void* __tsan_memmove(void* to, const void* from, size_t n) { return std::memmove(to, from, n); }
void* __tsan_memset(void* to, int value, size_t size) { return std::memset(to, value, size); }
void __tsan_read_range(void* address, size_t size) {
  emulator::Plain(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  emulator::Plain(address, size, true, __builtin_return_address(0));
}
#define TCL_PLAIN(name, size)                                           \
  void __tsan_##name##read##size(void* address) {                       \
    emulator::Plain(address, size, false, __builtin_return_address(0)); \
  }                                                                     \
  void __tsan_##name##write##size(void* address) {                      \
    emulator::Plain(address, size, true, __builtin_return_address(0));  \
  }
TCL_PLAIN(, 1)
TCL_PLAIN(, 2)
TCL_PLAIN(, 4)
TCL_PLAIN(, 8)
TCL_PLAIN(, 16)
TCL_PLAIN(unaligned_, 2)
TCL_PLAIN(unaligned_, 4)
TCL_PLAIN(unaligned_, 8)
TCL_PLAIN(unaligned_, 16)
}
