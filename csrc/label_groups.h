// Labels -> groups of equal labels.
//
// One pass over the batch through an open-addressing table of at most 8 B slots, then a counting
// order: O(B) time and memory whatever the number of classes. Groups stand in the order in which
// their labels first occur, members of a group in batch order, so everything derived from them is
// the same on every run. Labels are checked before anything is written anywhere.

#ifndef TF_CENTER_LOSS_OP_CSRC_LABEL_GROUPS_H_
#define TF_CENTER_LOSS_OP_CSRC_LABEL_GROUPS_H_

#include <cstdint>
#include <memory>

namespace tcl {

class LabelGroups {
 public:
  // Groups labels[0, batch), batch < 2^32 - 1. Returns -1, or the position of the first label
  // outside [0, classes) that is not ignored; the groups are then unusable.
  template <typename Label>
  int64_t Build(const Label* labels, int64_t batch, int64_t classes, bool has_ignore_class,
                int64_t ignore_class);

  int64_t size() const { return size_; }        // number of distinct counted labels
  int64_t counted() const { return counted_; }  // N
  int64_t label(int64_t group) const { return label_[group]; }
  // Members of the group are order()[begin(group)] to order()[begin(group + 1) - 1].
  int64_t begin(int64_t group) const { return begin_[group]; }
  const int64_t* order() const { return order_; }
  // The group whose member order()[position] is; position < counted().
  int64_t Find(int64_t position) const;
  // The batch's ignored samples: order()[counted()] to order()[batch - 1].

 private:
  // What a batch of 64 takes is no reason to ask for memory.
  static constexpr int64_t kSmall = 512;
  int64_t small_[kSmall];
  std::unique_ptr<int64_t[]> memory_;
  int64_t* order_ = nullptr;  // [B]
  int64_t* label_ = nullptr;  // [size]
  int64_t* begin_ = nullptr;  // [size + 1]
  int64_t size_ = 0;
  int64_t counted_ = 0;
};

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_LABEL_GROUPS_H_
