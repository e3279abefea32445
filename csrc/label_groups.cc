#include "csrc/label_groups.h"

#include <algorithm>

namespace tcl {
namespace {

constexpr int64_t kIgnored = -1;

// A multiplicative hash: the high bits of label * 2^64 / golden ratio. Consecutive labels spread,
// which the low bits of the label would not promise for labels that share a stride.
inline int64_t Slot(int64_t label, int shift) {
  return static_cast<int64_t>((static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u) >> shift);
}

}  // namespace

template <typename Label>
int64_t LabelGroups::Build(const Label* labels, int64_t batch, int64_t classes,
                           bool has_ignore_label, int64_t ignore_label) {
  int bits = 1;
  while ((int64_t{1} << bits) < 2 * batch) ++bits;
  // With few classes the label is its own slot: no hash, no collision.
  const bool direct = classes <= (int64_t{1} << bits);
  const int64_t slots = direct ? classes : int64_t{1} << bits;
  const int64_t mask = slots - 1;

  memory_.reset(new int64_t[static_cast<size_t>(4 * batch + 1 + slots)]);
  order_ = memory_.get();
  label_ = order_ + batch;
  begin_ = label_ + batch;
  int64_t* const group_of = begin_ + batch + 1;
  int64_t* const table = group_of + batch;  // slot -> group + 1, 0 where empty
  std::fill_n(table, slots, 0);

  size_ = 0;
  int64_t ignored = 0;
  int64_t* const count = begin_;  // counts first, offsets afterwards
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t label = static_cast<int64_t>(labels[i]);
    if (has_ignore_label && label == ignore_label) {
      group_of[i] = kIgnored;
      ++ignored;
      continue;
    }
    if (label < 0 || label >= classes) return i;
    int64_t slot = direct ? label : Slot(label, 64 - bits);
    while (table[slot] != 0 && label_[table[slot] - 1] != label) slot = (slot + 1) & mask;
    if (table[slot] == 0) {
      label_[size_] = label;
      count[size_] = 0;
      table[slot] = ++size_;
    }
    group_of[i] = table[slot] - 1;
    ++count[group_of[i]];
  }
  counted_ = batch - ignored;

  int64_t offset = 0;
  for (int64_t g = 0; g < size_; ++g) {
    const int64_t members = count[g];
    begin_[g] = offset;
    offset += members;
  }
  // Filling moves each offset to its group's end, the next group's begin; shifting restores them.
  int64_t next_ignored = counted_;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t group = group_of[i];
    order_[group == kIgnored ? next_ignored++ : begin_[group]++] = i;
  }
  for (int64_t g = size_; g > 0; --g) begin_[g] = begin_[g - 1];
  begin_[0] = 0;
  return -1;
}

template int64_t LabelGroups::Build(const int32_t*, int64_t, int64_t, bool, int64_t);
template int64_t LabelGroups::Build(const int64_t*, int64_t, int64_t, bool, int64_t);

}  // namespace tcl
