#include "csrc/label_groups.h"

#include <algorithm>

namespace tcl {
namespace {

constexpr uint32_t kIgnored = static_cast<uint32_t>(-1);

// A table filled to a quarter at most: probing further is what a processor cannot predict.
constexpr int64_t kSlotsPerSample = 4;

// A multiplicative hash: the high bits of label * 2^64 / golden ratio. Consecutive labels spread,
// which the low bits of the label would not promise for labels that share a stride.
inline int64_t Slot(int64_t label, int shift) {
  return static_cast<int64_t>((static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u) >> shift);
}

}  // namespace

template <typename Label>
int64_t LabelGroups::Build(const Label* labels, int64_t batch, int64_t classes,
                           bool has_ignore_class, int64_t ignore_class) {
  int bits = 1;
  while ((int64_t{1} << bits) < kSlotsPerSample * batch) ++bits;
  // With few classes the label is its own slot: no hash, no collision.
  const bool direct = classes <= (int64_t{1} << bits);
  const int64_t slots = direct ? classes : int64_t{1} << bits;
  const int64_t mask = slots - 1;

  const int64_t needed = 3 * batch + 1 + (batch + slots + 1) / 2;
  if (needed > kSmall) memory_.reset(new int64_t[static_cast<size_t>(needed)]);
  int64_t* const order = needed > kSmall ? memory_.get() : small_;
  int64_t* const label_of = order + batch;
  int64_t* const begin = label_of + batch;
  uint32_t* const group_of = reinterpret_cast<uint32_t*>(begin + batch + 1);
  uint32_t* const table = group_of + batch;  // slot -> group + 1, 0 where empty
  std::fill_n(table, slots, 0);

  uint32_t size = 0;
  int64_t ignored = 0;
  int64_t* const count = begin;  // counts first, offsets afterwards
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t label = static_cast<int64_t>(labels[i]);
    if (has_ignore_class && label == ignore_class) {
      group_of[i] = kIgnored;
      ++ignored;
      continue;
    }
    if (label < 0 || label >= classes) return i;
    int64_t slot = direct ? label : Slot(label, 64 - bits);
    uint32_t group = table[slot];
    while (group != 0 && label_of[group - 1] != label) {
      slot = (slot + 1) & mask;
      group = table[slot];
    }
    if (group == 0) {
      label_of[size] = label;
      count[size] = 0;
      table[slot] = group = ++size;
    }
    group_of[i] = group - 1;
    ++count[group - 1];
  }

  int64_t offset = 0;
  for (int64_t g = 0; g < size; ++g) {
    const int64_t members = count[g];
    begin[g] = offset;
    offset += members;
  }
  // Filling moves each offset to its group's end, the next group's begin; shifting restores them.
  int64_t next_ignored = offset;
  for (int64_t i = 0; i < batch; ++i) {
    const uint32_t group = group_of[i];
    order[group == kIgnored ? next_ignored++ : begin[group]++] = i;
  }
  for (int64_t g = size; g > 0; --g) begin[g] = begin[g - 1];
  begin[0] = 0;
  order_ = order;
  label_ = label_of;
  begin_ = begin;
  size_ = size;
  counted_ = batch - ignored;
  return -1;
}

int64_t LabelGroups::Find(int64_t position) const {
  return std::upper_bound(begin_, begin_ + size_, position) - begin_ - 1;
}

template int64_t LabelGroups::Build(const int32_t*, int64_t, int64_t, bool, int64_t);
template int64_t LabelGroups::Build(const int64_t*, int64_t, int64_t, bool, int64_t);

}  // namespace tcl
