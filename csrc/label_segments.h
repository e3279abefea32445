// Sorts the positions of a batch by label. A segment holds the samples of one label.
//
// This is a counting sort: a hash table numbers the distinct labels and counts their samples, then
// each position is written to its place. Time and memory are O(B) and do not depend on the number
// of classes. Segments are in the order in which their labels first occur, and the samples of a
// segment in batch order, so that sums by segment have the same order on every run. This file reads
// labels only; it knows neither features nor centers.

#ifndef TF_CENTER_LOSS_OP_CSRC_LABEL_SEGMENTS_H_
#define TF_CENTER_LOSS_OP_CSRC_LABEL_SEGMENTS_H_

#include <cstdint>
#include <memory>

namespace tcl {

class LabelSegments {
 public:
  // Sorts labels[0, batch), batch < 2^32 - 1. Returns -1, or the position of the first label that
  // is outside [0, classes) and not ignored; the segments are then invalid.
  template <typename Label>
  int64_t Build(const Label* labels, int64_t batch, int64_t classes, bool has_ignore_class,
                int64_t ignore_class);

  int64_t size() const { return size_; }        // number of distinct counted labels
  int64_t counted() const { return counted_; }  // N
  int64_t label(int64_t segment) const { return label_[segment]; }

  // The positions in the batch, sorted. Those of a segment are at [begin(segment),
  // begin(segment + 1)), those of the ignored samples at [counted(), batch).
  const int64_t* positions() const { return positions_; }
  int64_t begin(int64_t segment) const { return begin_[segment]; }

  // The segment of positions()[index], index < counted().
  int64_t SegmentAt(int64_t index) const;

 private:
  // Holds the arrays of every batch of up to 72 samples, which saves the allocation.
  static constexpr int64_t kInlineSize = 512;
  int64_t inline_buffer_[kInlineSize];
  std::unique_ptr<int64_t[]> heap_buffer_;
  int64_t* positions_ = nullptr;  // [B]
  int64_t* label_ = nullptr;      // [size]
  int64_t* begin_ = nullptr;      // [size + 1]
  int64_t size_ = 0;
  int64_t counted_ = 0;
};

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_LABEL_SEGMENTS_H_
