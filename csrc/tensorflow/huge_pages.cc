// Implements huge_pages.h with mmap and madvise on Linux; on other systems memory is only aligned.
//
// The allocator calls mmap itself. TensorFlow's allocators and std::aligned_alloc may return
// recycled memory, in which zeros have to be written; new pages of mmap read as zero.

#include "csrc/tensorflow/huge_pages.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "absl/synchronization/mutex.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tcl {
namespace {

constexpr uint64_t kHugePage = uint64_t{1} << 21;

constexpr uint64_t RoundDown(uint64_t n) { return n & ~(kHugePage - 1); }
constexpr uint64_t RoundUp(uint64_t n) { return RoundDown(n + kHugePage - 1); }

bool SystemOffersHugePages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(file, modes);
  return !modes.empty() && modes.find("[never]") == std::string::npos;
}

}  // namespace

bool HugePagesEnabled() {
  static const bool enabled = [] {
    const char* const set = std::getenv("TF_CENTER_LOSS_HUGE_PAGES");
    return (set == nullptr || std::string(set) != "0") && SystemOffersHugePages();
  }();
  return enabled;
}

namespace {

#if defined(__linux__)
constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1; older kernels return an error

// Calls madvise for the huge pages that lie entirely within the memory.
void Advise(const void* memory, int64_t bytes, int advice) {
  const uint64_t begin = RoundUp(reinterpret_cast<uint64_t>(memory));
  const uint64_t end = RoundDown(reinterpret_cast<uint64_t>(memory) + static_cast<uint64_t>(bytes));
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}
#endif

class Allocator : public tensorflow::Allocator {
 public:
  std::string Name() override { return "tf_center_loss_op_huge_pages"; }

#if defined(__linux__)
  void* AllocateRaw(size_t /*alignment*/, size_t bytes) override {
    bytes = RoundUp(bytes);
    // The mapping is one huge page longer than the array, so that the array can be aligned.
    void* const mapping = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    void* const memory = reinterpret_cast<void*>(RoundUp(reinterpret_cast<uint64_t>(mapping)));
    if (HugePagesEnabled()) madvise(memory, bytes, MADV_HUGEPAGE);
    absl::MutexLock lock(mutex_);
    mappings_[memory] = {mapping, bytes + kHugePage};
    return memory;
  }

  void DeallocateRaw(void* memory) override {
    absl::MutexLock lock(mutex_);
    const auto found = mappings_.find(memory);
    munmap(found->second.first, found->second.second);
    mappings_.erase(found);
  }
#else
  void* AllocateRaw(size_t /*alignment*/, size_t bytes) override {
    void* const memory = std::aligned_alloc(kHugePage, RoundUp(bytes));
    if (memory != nullptr) std::memset(memory, 0, bytes);
    return memory;
  }

  void DeallocateRaw(void* memory) override { std::free(memory); }
#endif

  bool Owns(const void* memory) {
    absl::MutexLock lock(mutex_);
    return mappings_.count(memory) != 0;
  }

 private:
  absl::Mutex mutex_;
  std::unordered_map<const void*, std::pair<void*, size_t>> mappings_ ABSL_GUARDED_BY(mutex_);
};

Allocator* TheAllocator() {
  static Allocator* const allocator = new Allocator;
  return allocator;
}

}  // namespace

tensorflow::Allocator* HugePageAllocator() { return TheAllocator(); }

namespace {

absl::Mutex moved_mutex(absl::kConstInit);
// The addresses for which MoveToHugePages was called. An address stays when its memory is freed, so
// a later table at the same address is not moved.
std::unordered_set<const void*>& Moved() ABSL_SHARED_LOCKS_REQUIRED(moved_mutex) {
  static auto* const moved = new std::unordered_set<const void*>;
  return *moved;
}

}  // namespace

bool MovedToHugePages(const void* memory) {
  absl::ReaderMutexLock lock(moved_mutex);
  return Moved().count(memory) != 0;
}

void MoveToHugePages(const void* memory, int64_t bytes) {
#if defined(__linux__)
  if (!TheAllocator()->Owns(memory)) {
    Advise(memory, bytes, MADV_HUGEPAGE);
    Advise(memory, bytes, kCollapse);
  }
#endif
  absl::MutexLock lock(moved_mutex);
  Moved().insert(memory);
}

}  // namespace tcl
