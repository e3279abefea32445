// Large arrays on large pages (2 MiB), where the system offers them. Rows of a table that are read
// at random miss the translation buffer of small pages almost every time.
//
// TF_CENTER_LOSS_HUGE_PAGES=0 in the environment switches this off; it is off, too, where the
// system says "never" (/sys/kernel/mm/transparent_hugepage/enabled).

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_HUGE_PAGES_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_HUGE_PAGES_H_

#include <cstdint>

#include "tensorflow/core/framework/allocator.h"

namespace tcl {

// Smaller arrays gain nothing.
constexpr int64_t kMinBytesForHugePages = int64_t{1} << 22;

bool HugePagesWanted();

// Zeros straight from the system, which become memory, in large pages, when they are first touched.
tensorflow::Allocator* HugePageAllocator();

// Moves what lies in small pages into large ones; addresses and contents stay. Best effort, at
// about two seconds for a gigabyte; nothing to do for memory of the HugePageAllocator.
void MoveToHugePages(const void* memory, int64_t bytes);

// Whether memory at this address was moved, or tried to, before. Some tens of nanoseconds.
bool MovedToHugePages(const void* memory);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_HUGE_PAGES_H_
