// A ParallelFor (center_loss_cpu.h) on the threads of a framework's pool.

#ifndef TF_CENTER_LOSS_OP_CSRC_POOL_THREADS_H_
#define TF_CENTER_LOSS_OP_CSRC_POOL_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "csrc/center_loss_cpu.h"
#include "csrc/spin.h"

namespace tcl {

// Chunks of a range, which the threads take one by one. The caller takes part until none is left
// and then waits for chunks in progress only: helpers that never got a thread are not waited for,
// so calls that hold all of a pool's threads cannot lock each other out.
class Chunks {
 public:
  Chunks(int64_t total, int64_t chunks, const Work& work)
      : total_(total), chunks_(chunks), work_(work) {}

  // Does chunks until none is left, or so many.
  void Do(int64_t most) {
    for (int64_t k; most-- > 0 && (k = next_++) < chunks_;) {
      work_(total_ * k / chunks_, total_ * (k + 1) / chunks_);
      if (++done_ < chunks_) continue;
      std::lock_guard<std::mutex> lock(mutex_);
      all_done_.notify_one();
    }
  }

  void Help() {
    has_help_ = true;
    Do(chunks_);
  }

  bool has_help() const { return has_help_; }

  void Wait() {
    // A chunk in progress ends sooner than a thread that sleeps could be woken.
    const auto done = [this] { return done_ == chunks_; };
    if (SpinUntil(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, done);
  }

 private:
  const int64_t total_, chunks_;
  const Work& work_;  // outlives every chunk, though not every helper
  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<bool> has_help_{false};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// Several chunks a thread even out what other work the threads have.
constexpr int64_t kChunksPerThread = 16;

// The caller and up to threads - 1 helpers. The caller works, too: waking a thread that sleeps
// takes as long as a small step, and what the caller does meanwhile is not waited for.
//
// schedule(task, again) runs a task on another thread. `again`: those asked first have not come
// after a quarter of the caller's share; where there are others, they are asked now.
template <typename Schedule>
ParallelFor OnThreads(Schedule schedule, int64_t threads) {
  return [schedule, threads](int64_t total, int64_t bytes, const Work& work) {
    const int64_t wanted = std::min({threads, total, total * bytes / kMinBytesPerThread + 1});
    if (wanted <= 1) return work(0, total);
    const int64_t count = std::min(total, wanted * kChunksPerThread);
    const auto chunks = std::make_shared<Chunks>(total, count, work);
    const auto ask_for_help = [&, caller = std::this_thread::get_id()](bool again) {
      for (int64_t t = 1; t < wanted; ++t) {
        // A schedule may run tasks at once: that is no help.
        const auto help = [chunks, caller] {
          if (std::this_thread::get_id() != caller) chunks->Help();
        };
        schedule(help, again);
      }
    };
    ask_for_help(false);
    chunks->Do(kChunksPerThread / 4);
    if (!chunks->has_help()) ask_for_help(true);
    chunks->Do(count);
    chunks->Wait();
  };
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_POOL_THREADS_H_
