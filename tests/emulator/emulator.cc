// Fibers, their scheduler, and what they meet at.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

// AddressSanitizer has to be told of every change of stacks, and knows swapcontext. Without it,
// longjmp does the same without a system call.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = size_t{128} << 10;
// So many turns in which nothing but waiting was done are a deadlock.
constexpr int64_t kMostIdleTurns = int64_t{1} << 22;

struct Settings {
  uint64_t seed = 0;
  int multiprocessors = 2;
  std::string skipped;  // "file:line" of a barrier that is left out
} settings;

struct Fiber;

struct Warp {
  std::vector<Fiber*> waiting;
  int exited = 0;
  int turn = 0;  // two turns' values are kept: a lane may read while others bring the next
  const char* what = nullptr;
  uint64_t values[2][kWarp];
  bool slow = false;
};

struct Block {
  std::vector<Fiber*> waiting;
  int exited = 0;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

struct Fiber {
  dim3 thread, block;
  Block* in_block;
  Warp* in_warp;
  int lane;
  unsigned char* stack;
  ucontext_t context;
  jmp_buf point;
  bool started = false;
  void* fake_stack = nullptr;
};

struct Run {
  const std::function<void()>* body;
  unsigned grid, block;
  size_t shared;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  size_t alive = 0;
  Fiber* fiber = nullptr;  // the one that runs
  ucontext_t scheduler;
  jmp_buf scheduler_point;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::mt19937_64 random;
  int64_t idle_turns = 0;
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
  run->idle_turns = 0;
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

// Waits with the others until the last of `all` comes, who wakes them and gets true.
bool Meet(std::vector<Fiber*>* waiting, size_t all) {
  if (waiting->size() + 1 < all) {
    waiting->push_back(run->fiber);
    ToScheduler(false);
    return false;
  }
  run->ready.insert(run->ready.end(), waiting->begin(), waiting->end());
  waiting->clear();
  run->idle_turns = 0;
  return true;
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
  // One schedule in two has warps that hardly ever run.
  for (Warp& warp : block->warps) {
    warp.slow = settings.seed % 2 == 1 && run->random() % 4 == 0;
  }
  block->shared.reset(new unsigned char[run->shared]);
  std::memset(block->shared.get(), 0xcd, run->shared);
  for (unsigned t = 0; t < run->block; ++t) {
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = dim3(t, 0, 0);
    fiber->block = dim3(index, 0, 0);
    fiber->in_block = block.get();
    fiber->in_warp = &block->warps[t / kWarp];
    fiber->lane = static_cast<int>(t % kWarp);
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
  size_t picked = run->random() % ready;
  for (int tries = 0; tries < 8 && run->ready[picked]->in_warp->slow; ++tries) {
    picked = run->random() % ready;
  }
  return picked;
}

}  // namespace

int Lane() { return run->fiber->lane; }

unsigned char* SharedMemory() { return run->fiber->in_block->shared.get(); }

void MayYield() {
  run->idle_turns = 0;
  if (settings.seed != 0 && run->random() % 4 == 0) Yield();
}

void Spin() {
  ++run->idle_turns;
  Yield();
}

void SyncThreads(const char* file, int line) {
  if (Skipped(file, line)) return MayYield();
  Block* const block = run->fiber->in_block;
  if (block->exited > 0) Fail("a thread left its block before a barrier of the others");
  if (Meet(&block->waiting, run->block) && settings.seed != 0) Yield();
}

void SyncWarp(const char* file, int line) {
  if (Skipped(file, line)) return MayYield();
  Exchange("__syncwarp", 0);
}

const uint64_t* Exchange(const char* what, uint64_t bits) {
  Warp* const warp = run->fiber->in_warp;
  if (warp->exited > 0) Fail(std::string("a lane left its warp before ") + what);
  if (warp->waiting.empty()) warp->what = what;
  if (std::strcmp(warp->what, what) != 0) {
    Fail(std::string("lanes of one warp meet in ") + warp->what + " and " + what);
  }
  uint64_t* const values = warp->values[warp->turn % 2];
  values[run->fiber->lane] = bits;
  if (warp->waiting.size() + 1 == kWarp) ++warp->turn;
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
  // Blocks that need not be resident together are not: two at a time, in an order by the seed.
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
    if (now.idle_turns > kMostIdleTurns) now.error = "deadlock: every thread waits";
    start_blocks();
  }
  if (now.error.empty() && now.alive > 0) now.error = "deadlock: every thread waits";
  for (auto& fiber : now.fibers) stacks.push_back(fiber->stack);
  run = nullptr;
  last_error = now.error;
  return now.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

cudaError_t cudaGetDevice(int* device) {
  *device = 1000;  // beyond what is remembered: the tests change the number below
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

// seed 0: one thread after the other. Other seeds: by chance; odd ones with slow warps.
extern "C" void tcl_emulator_configure(uint64_t seed, int multiprocessors, const char* skipped) {
  emulator::settings = {seed, multiprocessors, skipped};
}
