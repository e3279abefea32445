// Puts large arrays on transparent huge pages (2 MiB) where Linux offers them: random reads of a
// large table miss the TLB almost every time with pages of 4 KiB. This file knows addresses and
// sizes, not what they hold.
//
// TF_CENTER_LOSS_HUGE_PAGES=0 in the environment disables it, and so does "never" in
// /sys/kernel/mm/transparent_hugepage/enabled.

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_HUGE_PAGES_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_HUGE_PAGES_H_

#include <cstdint>

#include "tensorflow/core/framework/allocator.h"

namespace tcl {

// Smaller arrays do not get faster.
constexpr int64_t kMinBytesForHugePages = int64_t{1} << 22;

bool HugePagesEnabled();

// Allocates memory that reads as zero. Its pages are mapped on first access, as huge pages if
// enabled.
tensorflow::Allocator* HugePageAllocator();

// Moves memory from small to huge pages; addresses and contents stay. This is best effort and takes
// about two seconds per gigabyte. Memory of the HugePageAllocator is left as it is.
void MoveToHugePages(const void* memory, int64_t bytes);

// True if MoveToHugePages was called for this address before. Takes some tens of nanoseconds.
bool MovedToHugePages(const void* memory);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_HUGE_PAGES_H_
