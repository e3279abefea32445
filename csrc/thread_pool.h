// Builds a ParallelFor (center_loss_cpu.h) from a framework's thread pool. The pool is known only
// as a function that schedules a task; no framework is included.
//
// TensorFlow's Shard and Eigen's parallelFor return when the pool has run every block, so callers
// that occupy all threads of a pool deadlock, and they cannot use the threads that run the ops.
// Here the calling thread works too, and it waits only for shards that have started.

#ifndef TF_CENTER_LOSS_OP_CSRC_THREAD_POOL_H_
#define TF_CENTER_LOSS_OP_CSRC_THREAD_POOL_H_

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

// A range cut into shards, which the calling thread and its helpers claim one by one from a shared
// counter.
class Shards {
 public:
  Shards(int64_t total, int64_t shards, const Work& work)
      : total_(total), shards_(shards), work_(work) {}

  // Claims and runs shards until none is left, at most `limit`.
  void Run(int64_t limit) {
    for (int64_t k; limit-- > 0 && (k = next_++) < shards_;) {
      work_(total_ * k / shards_, total_ * (k + 1) / shards_);
      if (++done_ < shards_) continue;
      std::lock_guard<std::mutex> lock(mutex_);
      all_done_.notify_one();
    }
  }

  void RunAsHelper() {
    has_helper_ = true;
    Run(shards_);
  }

  bool has_helper() const { return has_helper_; }

  void Wait() {
    // A shard in progress usually ends before a sleeping thread would be awake.
    const auto done = [this] { return done_ == shards_; };
    if (SpinUntil(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, done);
  }

 private:
  const int64_t total_, shards_;
  // Valid until the last shard is done. A helper that starts later finds no shard and does not
  // touch it.
  const Work& work_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<bool> has_helper_{false};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// More shards than threads balance the load when some threads are delayed by other work.
constexpr int64_t kShardsPerThread = 16;

// Returns a ParallelFor on the calling thread and up to threads - 1 helpers.
//
// schedule(task, retry) runs the task on another thread. It is called with retry = false first, and
// with retry = true if no helper has started after a quarter of the caller's share; a framework
// with a second thread pool then uses that one.
template <typename Schedule>
ParallelFor MakeParallelFor(Schedule schedule, int64_t threads) {
  return [schedule, threads](int64_t total, int64_t bytes, const Work& work) {
    const int64_t wanted = std::min({threads, total, total * bytes / kMinBytesPerThread + 1});
    if (wanted <= 1) return work(0, total);
    const int64_t count = std::min(total, wanted * kShardsPerThread);
    // Shared, because a helper may start after this call has returned.
    const auto shards = std::make_shared<Shards>(total, count, work);
    const auto schedule_helpers = [&, caller = std::this_thread::get_id()](bool retry) {
      for (int64_t t = 1; t < wanted; ++t) {
        // A schedule function may run the task inline, on the calling thread. That must not count
        // as a helper.
        const auto help = [shards, caller] {
          if (std::this_thread::get_id() != caller) shards->RunAsHelper();
        };
        schedule(help, retry);
      }
    };
    schedule_helpers(false);
    shards->Run(kShardsPerThread / 4);
    if (!shards->has_helper()) schedule_helpers(true);
    shards->Run(count);
    shards->Wait();
  };
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_THREAD_POOL_H_
