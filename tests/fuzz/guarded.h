// Arrays whose first or last element lies at a page that nothing may touch.

#ifndef TF_CENTER_LOSS_OP_TESTS_FUZZ_GUARDED_H_
#define TF_CENTER_LOSS_OP_TESTS_FUZZ_GUARDED_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// `size` numbers between two guard pages. A read or write outside the array ends the process, on
// the side where the array touches its guard page; sanitizers do not see the masked loads and
// stores of the row loops.
template <typename T>
class Guarded {
 public:
  Guarded(int64_t size, bool at_end) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    inner_bytes_ = (bytes + page - 1) / page * page;
    total_ = inner_bytes_ + 2 * page;
    void* const mapped =
        mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      std::perror("mmap");
      std::abort();
    }
    memory_ = static_cast<char*>(mapped);
    inner_ = memory_ + page;
    Protect(PROT_READ | PROT_WRITE);
    data_ = reinterpret_cast<T*>(at_end ? inner_ + inner_bytes_ - bytes : inner_);
  }
  ~Guarded() { munmap(memory_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  // A write to an array that is only read ends the process, too.
  void MakeReadOnly() { Protect(PROT_READ); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  bool HasBitsOf(const Guarded& other) const {
    return std::memcmp(data_, other.data_, static_cast<size_t>(size_) * sizeof(T)) == 0;
  }
  void CopyFrom(const Guarded& other) {
    std::memcpy(data_, other.data_, static_cast<size_t>(size_) * sizeof(T));
  }

 private:
  void Protect(int access) {
    if (inner_bytes_ != 0 && mprotect(inner_, inner_bytes_, access) != 0) {
      std::perror("mprotect");
      std::abort();
    }
  }

  const int64_t size_;
  size_t inner_bytes_ = 0, total_ = 0;
  char *memory_ = nullptr, *inner_ = nullptr;
  T* data_ = nullptr;
};

#endif  // TF_CENTER_LOSS_OP_TESTS_FUZZ_GUARDED_H_
