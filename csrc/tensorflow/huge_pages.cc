#include "csrc/tensorflow/huge_pages.h"

#include <cstdlib>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tcl {
namespace {

constexpr uint64_t kHugePage = uint64_t{1} << 21;

bool SystemOffersHugePages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(file, modes);
  return !modes.empty() && modes.find("[never]") == std::string::npos;
}

#if defined(__linux__)
constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1; older kernels refuse it

// Calls madvise for the whole large pages within the memory.
void Advise(const void* memory, int64_t bytes, int advice) {
  const uint64_t begin = (reinterpret_cast<uint64_t>(memory) + kHugePage - 1) & ~(kHugePage - 1);
  const uint64_t end =
      (reinterpret_cast<uint64_t>(memory) + static_cast<uint64_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}
#endif

class Allocator : public tensorflow::Allocator {
 public:
  std::string Name() override { return "tf_center_loss_op_huge_pages"; }

  void* AllocateRaw(size_t /*alignment*/, size_t bytes) override {
    void* const memory = std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) & ~(kHugePage - 1));
#if defined(__linux__)
    if (memory != nullptr) Advise(memory, static_cast<int64_t>(bytes), MADV_HUGEPAGE);
#endif
    return memory;
  }

  void DeallocateRaw(void* memory) override { std::free(memory); }
};

}  // namespace

bool HugePagesWanted() {
  static const bool wanted = [] {
    const char* const set = std::getenv("TF_CENTER_LOSS_HUGE_PAGES");
    return (set == nullptr || std::string(set) != "0") && SystemOffersHugePages();
  }();
  return wanted;
}

tensorflow::Allocator* HugePageAllocator() {
  static Allocator* const allocator = new Allocator;
  return allocator;
}

void MoveToHugePages(const void* memory, int64_t bytes) {
#if defined(__linux__)
  Advise(memory, bytes, MADV_HUGEPAGE);
  Advise(memory, bytes, kCollapse);
#endif
}

}  // namespace tcl
