// The CPU kernel of the center loss step.
//
// The labels are sorted into segments (label_segments.h), and each segment is cut into chunks of at
// most kChunkSamples samples. A thread gets ranges of the sorted samples and runs the chunks that
// begin in them. For each chunk it reads the features and the center from memory once, writes the
// scaled residuals, and adds up the residuals in batch order. If the segment is a single chunk, its
// center moves at once, while center and sum are in a cache. A heavy segment has several chunks,
// each of which stores a partial sum. When all chunks are done, the partial sums are added in
// order, in parallel over segments and column blocks, so that a batch of one label uses all threads
// too.
//
// If all labels are distinct, the step reads or writes 4 B D numbers in memory: features, scaled
// residuals, and each center twice.
//
// Up to kMaxOverlappedBatch samples, the threads are woken before the labels are sorted, so that
// they wake up during the sort.
//
// Results are deterministic: the labels alone determine which sums are computed and in which order.

#include "csrc/center_loss_cpu.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "csrc/center_loss_math.h"
#include "csrc/isa.h"
#include "csrc/label_segments.h"
#include "csrc/row_loops.h"
#include "csrc/spin.h"

namespace tcl {
namespace {

// Large enough that writing the partial sums costs only 1/64 of reading the features, small enough
// that several threads share a batch of a few hundred samples of one label.
constexpr int64_t kChunkSamples = 64;

// Larger batches are sorted before the threads are woken: the threads would wait for the sort
// longer than they take to wake up.
constexpr int64_t kMaxOverlappedBatch = 8192;

// How far ahead chunks are prefetched: as many chunks as have kPrefetchBytes of centers, at least
// one and at most kMaxPrefetchChunks. If rows are short, prefetching only the next chunk is too
// late; if they are long, several prefetched chunks evict each other from the first-level cache.
// Measured for D = 16 to 1024.
constexpr int64_t kPrefetchBytes = 2048;
constexpr int64_t kMaxPrefetchChunks = 8;

// Partial sums are added in blocks of this many columns. A block's size is a multiple of the cache
// line, so that two threads share no more than the line at the boundary of their blocks.
constexpr int64_t kColumnBlock = 256;

// Arrays of sums start on a cache line, because a vector access that crosses from one line to the
// next takes twice as long. Later rows start on one only if the size of a row is a multiple of it.
constexpr std::align_val_t kCacheLine{64};
struct AlignedDelete {
  void operator()(void* memory) const { operator delete(memory, kCacheLine); }
};
template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;
template <typename T>
AlignedArray<T> NewAlignedArray(int64_t size) {
  return AlignedArray<T>(
      static_cast<T*>(operator new(static_cast<size_t>(size) * sizeof(T), kCacheLine)));
}
// As above; null where there is no memory.
template <typename T>
AlignedArray<T> TryNewAlignedArray(int64_t size) {
  return AlignedArray<T>(static_cast<T*>(operator new(static_cast<size_t>(size) * sizeof(T),
                                                      kCacheLine, std::nothrow)));
}

// Up to kChunkSamples samples of one segment: [begin, end) of the sorted positions.
struct Chunk {
  int64_t segment;
  int64_t begin;
  int64_t end;
  int64_t partial;  // row of its partial sum, -1 if the segment is a single chunk
};

// A segment of several chunks and its rows of partial sums.
struct HeavySegment {
  int64_t segment;
  int64_t first_partial;
  int64_t partials;
};

// One call of CenterLossOnCpu. The threads of parallel_for share it.
template <typename Feature, typename Label>
class Step {
 public:
  using Center = CenterType<Feature>;

  Step(const StepArguments<Feature, Label>& step, const ParallelFor& parallel_for, Isa isa)
      : step_(step),
        loops_(GetRowLoops<Feature>(isa)),
        parallel_for_(parallel_for),
        prefetch_distance_(std::clamp<int64_t>(
            kPrefetchBytes / std::max<int64_t>(step.dim * static_cast<int64_t>(sizeof(Center)), 1),
            1, kMaxPrefetchChunks)) {}

  int64_t Run() {
    if (step_.batch > kMaxOverlappedBatch) Prepare();
    const int64_t row_bytes =
        step_.dim * static_cast<int64_t>(sizeof(Feature) + 3 * sizeof(Center));
    parallel_for_(step_.batch, row_bytes, [this](int64_t begin, int64_t end) {
      Prepare();
      if (status_ != kStepDone) return;
      RunChunks(begin, end);
      ZeroIgnored(begin, end);
    });
    Prepare();  // For an empty batch parallel_for may not call the body at all.
    if (status_ != kStepDone) return status_;
    AddPartialSums();
    ReduceLoss();
    return kStepDone;
  }

 private:
  // Sorts the labels, and computes and allocates what depends on them, on the first thread that
  // calls it. The other threads wait for the result.
  // std::call_once would put them to sleep, and waking up takes longer than sorting a small batch.
  void Prepare() {
    if (prepared_.load(std::memory_order_acquire)) return;
    if (preparing_.exchange(true)) {
      // The thread that sorts may be waiting for this thread's processor.
      while (!SpinUntil([this] { return prepared_.load(std::memory_order_acquire); })) {
        std::this_thread::yield();
      }
      return;
    }
    // This may be a thread of a pool, whose functions no exception may leave. All memory is
    // allocated here, before any thread writes to the centers.
    try {
      SortAndAllocate();
    } catch (const std::bad_alloc&) {
      status_ = kStepOutOfMemory;
    }
    prepared_.store(true, std::memory_order_release);
  }

  void SortAndAllocate() {
    const StepOptions<Center>& options = step_.options;
    const int64_t invalid = segments_.Build(step_.labels, step_.batch, step_.classes,
                                            options.has_ignore_class, options.ignore_class);
    if (invalid >= 0) {
      status_ = invalid;
      return;
    }
    // With alpha = 0 no center moves, so the table is not written.
    moves_centers_ = options.update_centers && options.alpha != 0;
    sample_scale_ = ReductionScale(options.reduction, options.loss_weight, segments_.counted());
    FindHeavySegments();
    if (step_.loss != nullptr && options.reduction != Reduction::kNone) {
      sample_loss_.reset(new Center[static_cast<size_t>(step_.batch)]);
    }
    if (moves_centers_ && step_.dim > kColumnBlock) {
      shared_sum_ = NewAlignedArray<Center>(step_.dim);
    }
  }

  void FindHeavySegments() {
    if (!moves_centers_ || step_.batch <= kChunkSamples) return;
    int64_t partials = 0;
    for (int64_t s = 0; s < segments_.size(); ++s) {
      const int64_t samples = segments_.begin(s + 1) - segments_.begin(s);
      if (samples <= kChunkSamples) continue;
      const int64_t chunks = (samples + kChunkSamples - 1) / kChunkSamples;
      heavy_segments_.push_back({s, partials, chunks});
      partials += chunks;
    }
    if (partials == 0) return;
    partial_sums_ = NewAlignedArray<Center>(partials * step_.dim);
    partial_counts_.reset(new int64_t[static_cast<size_t>(partials)]);
  }

  // The k-th chunk of the segment.
  Chunk ChunkOf(int64_t segment, int64_t k) const {
    const int64_t begin = segments_.begin(segment), end = segments_.begin(segment + 1);
    Chunk chunk{segment, begin + k * kChunkSamples, std::min(begin + (k + 1) * kChunkSamples, end),
                -1};
    if (moves_centers_ && end - begin > kChunkSamples) {
      const auto heavy =
          std::lower_bound(heavy_segments_.begin(), heavy_segments_.end(), segment,
                           [](const HeavySegment& a, int64_t b) { return a.segment < b; });
      chunk.partial = heavy->first_partial + k;
    }
    return chunk;
  }

  // Returns the first chunk that begins at or after index `begin` of the sorted positions, or an
  // empty chunk after the last segment. `begin` must lie in the segment or at its end.
  Chunk ChunkFrom(int64_t segment, int64_t begin) const {
    const int64_t k = (begin - segments_.begin(segment) + kChunkSamples - 1) / kChunkSamples;
    if (segments_.begin(segment) + k * kChunkSamples < segments_.begin(segment + 1)) {
      return ChunkOf(segment, k);
    }
    if (segment + 1 < segments_.size()) return ChunkOf(segment + 1, 0);
    return {segments_.size(), segments_.counted(), segments_.counted(), -1};
  }

  // Runs the chunks that begin in [begin, end) of the sorted positions.
  void RunChunks(int64_t begin, int64_t end) {
    end = std::min(end, segments_.counted());
    if (begin >= end) return;
    Chunk chunk = ChunkFrom(segments_.SegmentAt(begin), begin);
    if (chunk.begin >= end) return;
    alignas(64) Center inline_sum[kColumnBlock];
    Center* sum = inline_sum;
    AlignedArray<Center> heap_sum;
    std::unique_lock<std::mutex> shared_sum_lock;
    if (shared_sum_ != nullptr) {
      heap_sum = TryNewAlignedArray<Center>(step_.dim);
      sum = heap_sum.get();
      if (sum == nullptr) {
        // Other threads may have moved centers already, so the step must be completed.
        shared_sum_lock = std::unique_lock<std::mutex>(shared_sum_mutex_);
        sum = shared_sum_.get();
      }
    }
    RowArguments<Feature> rows;
    rows.features = step_.features;
    rows.sample_weight = step_.sample_weight;
    rows.scale = sample_scale_;
    rows.residual = step_.residual;
    // The first chunks are prefetched here; then each chunk, while it runs, prefetches the one that
    // is prefetch_distance_ chunks ahead of it.
    Chunk ahead = chunk;
    for (int64_t k = 0; k < prefetch_distance_; ++k) {
      SetPrefetch(&ahead, end, &rows);
      loops_.prefetch(rows, step_.dim);
    }
    while (chunk.begin < end) {
      rows.rows = chunk.end - chunk.begin;
      rows.positions = segments_.positions() + chunk.begin;
      rows.centers = CenterOf(chunk);
      rows.sum = chunk.partial >= 0 ? partial_sums_.get() + chunk.partial * step_.dim : sum;
      SetPrefetch(&ahead, end, &rows);
      RunChunk(chunk, rows);
      chunk = ChunkFrom(chunk.segment, chunk.end);
    }
  }

  // Makes *chunk the one to prefetch and advances *chunk to the next one. Past the end of the
  // thread's range it changes nothing, so the last chunk is prefetched again: other threads may be
  // writing the centers of the following chunks, and a prefetch would take these cache lines away.
  void SetPrefetch(Chunk* chunk, int64_t end, RowArguments<Feature>* rows) const {
    if (chunk->begin >= end) return;
    rows->prefetch_rows =
        static_cast<int>(std::min<int64_t>(chunk->end - chunk->begin, kRowsPerPass));
    rows->prefetch_positions = segments_.positions() + chunk->begin;
    rows->prefetch_centers = CenterOf(*chunk);
    *chunk = ChunkFrom(chunk->segment, chunk->end);
  }

  const Center* CenterOf(const Chunk& chunk) const {
    if (step_.features_are_residuals) return nullptr;
    return step_.centers + segments_.label(chunk.segment) * step_.dim;
  }

  // Writes the outputs of the chunk's samples and adds up their residuals in rows.sum. Then moves
  // the center, or leaves the sum as the chunk's partial sum.
  void RunChunk(const Chunk& chunk, const RowArguments<Feature>& rows) {
    Center squares[kChunkSamples];
    loops_.residual(rows, moves_centers_ ? SumMode::kStart : SumMode::kNone, step_.dim, squares);
    int64_t count = rows.rows;  // samples with finite features
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t i = rows.positions[r];
      StoreLoss(i, SampleWeight(i) * (squares[r] / 2));
      if (step_.squared_distance != nullptr) step_.squared_distance[i] = squares[r];
      // A finite sum of squares implies finite features. The squares of finite features may
      // overflow, so the row itself is tested otherwise.
      if (!IsFinite(squares[r])) count -= !IsFiniteSample(i);
    }
    if (!moves_centers_) return;
    if (count < rows.rows) SumFiniteSamples(rows);
    if (chunk.partial >= 0) {
      partial_counts_[static_cast<size_t>(chunk.partial)] = count;
    } else if (count > 0) {
      MoveCenter(chunk.segment, count, rows.sum, 0, step_.dim);
    }
  }

  // Recomputes the chunk's sum without the samples that hold a NaN or an infinity.
  void SumFiniteSamples(const RowArguments<Feature>& rows) {
    std::fill_n(rows.sum, step_.dim, Center{0});
    RowArguments<Feature> row = rows;  // one sample at a time
    row.rows = 1;
    row.residual = nullptr;
    for (; row.positions < rows.positions + rows.rows; ++row.positions) {
      Center squares;
      if (IsFiniteSample(*row.positions)) {
        loops_.residual(row, SumMode::kContinue, step_.dim, &squares);
      }
    }
  }

  bool IsFiniteSample(int64_t i) const {
    return loops_.all_finite(step_.features + i * step_.dim, step_.dim);
  }

  void MoveCenter(int64_t segment, int64_t count, const Center* sum, int64_t column,
                  int64_t columns) {
    const StepOptions<Center>& options = step_.options;
    loops_.move(step_.centers + segments_.label(segment) * step_.dim + column,
                StepScale(options.rule, options.alpha, count, segments_.counted()), sum, columns);
  }

  void AddPartialSums() {
    if (heavy_segments_.empty()) return;
    const int64_t blocks = (step_.dim + kColumnBlock - 1) / kColumnBlock;
    const int64_t bytes = kChunkSamples * kColumnBlock * static_cast<int64_t>(sizeof(Center));
    parallel_for_(static_cast<int64_t>(heavy_segments_.size()) * blocks, bytes,
                  [this, blocks](int64_t begin, int64_t end) {
                    for (int64_t k = begin; k < end; ++k) {
                      AddColumnBlock(heavy_segments_[static_cast<size_t>(k / blocks)],
                                     k % blocks * kColumnBlock);
                    }
                  });
  }

  void AddColumnBlock(const HeavySegment& heavy, int64_t column) {
    const int64_t columns = std::min(kColumnBlock, step_.dim - column);
    Center sum[kColumnBlock] = {};
    int64_t count = 0;
    for (int64_t p = heavy.first_partial; p < heavy.first_partial + heavy.partials; ++p) {
      // The partial sum of a chunk without a finite sample is zero.
      loops_.add(sum, partial_sums_.get() + p * step_.dim + column, columns);
      count += partial_counts_[static_cast<size_t>(p)];
    }
    if (count > 0) MoveCenter(heavy.segment, count, sum, column, columns);
  }

  void StoreLoss(int64_t i, Center loss) {
    if (sample_loss_ != nullptr) {
      sample_loss_[static_cast<size_t>(i)] = loss;
    } else if (step_.loss != nullptr) {
      step_.loss[i] = loss * sample_scale_;
    }
  }

  void ZeroIgnored(int64_t begin, int64_t end) {
    for (int64_t k = std::max(begin, segments_.counted()); k < end; ++k) {
      const int64_t i = segments_.positions()[k];
      StoreLoss(i, 0);
      if (step_.squared_distance != nullptr) step_.squared_distance[i] = 0;
      if (step_.residual != nullptr) {
        std::fill_n(step_.residual + i * step_.dim, step_.dim, Center{0});
      }
    }
  }

  // Adds the losses in batch order, in double; only the result is converted to Center.
  void ReduceLoss() {
    if (sample_loss_ == nullptr) return;
    double sum = 0;
    for (int64_t i = 0; i < step_.batch; ++i) sum += sample_loss_[static_cast<size_t>(i)];
    sum *= step_.options.loss_weight;
    if (step_.options.reduction == Reduction::kMean) {
      sum = segments_.counted() == 0 ? 0 : sum / static_cast<double>(segments_.counted());
    }
    *step_.loss = static_cast<Center>(sum);
  }

  Center SampleWeight(int64_t i) const {
    return step_.sample_weight == nullptr ? Center{1} : step_.sample_weight[i];
  }

  const StepArguments<Feature, Label>& step_;
  const RowLoops<Feature>& loops_;
  const ParallelFor& parallel_for_;
  const int64_t prefetch_distance_;
  std::atomic<bool> preparing_{false}, prepared_{false};
  LabelSegments segments_;
  int64_t status_ = kStepDone;  // what Run returns
  bool moves_centers_ = false;
  Center sample_scale_ = 0;
  std::vector<HeavySegment> heavy_segments_;
  AlignedArray<Center> partial_sums_;  // [partials, D]
  std::unique_ptr<int64_t[]> partial_counts_;
  std::unique_ptr<Center[]> sample_loss_;  // [B], null if no loss is reduced
  // [D], for threads that find no memory for a sum of their own, one after another. Null if a sum
  // fits into their stacks.
  AlignedArray<Center> shared_sum_;
  std::mutex shared_sum_mutex_;
};

}  // namespace

template <typename Feature, typename Label>
int64_t CenterLossOnCpu(const StepArguments<Feature, Label>& step, const ParallelFor& parallel_for,
                        Isa isa) {
  return Step<Feature, Label>(step, parallel_for, isa).Run();
}

template <typename Feature>
void BackwardOnCpu(const CenterType<Feature>* upstream, bool per_sample,
                   const CenterType<Feature>* residual, Feature* gradient, int64_t batch,
                   int64_t dim, const ParallelFor& parallel_for, Isa isa) {
  const RowLoops<Feature>& loops = GetRowLoops<Feature>(isa);
  const int64_t row_bytes =
      dim * static_cast<int64_t>(sizeof(Feature) + sizeof(CenterType<Feature>));
  parallel_for(batch, row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      loops.scale(residual + i * dim, upstream[per_sample ? i : 0], gradient + i * dim, dim);
    }
  });
}

#define TCL_INSTANTIATE_STEP(Feature, Label) \
  template int64_t CenterLossOnCpu(const StepArguments<Feature, Label>&, const ParallelFor&, Isa);
#define TCL_INSTANTIATE(Feature)                                                            \
  TCL_INSTANTIATE_STEP(Feature, int32_t)                                                    \
  TCL_INSTANTIATE_STEP(Feature, int64_t)                                                    \
  template void BackwardOnCpu(const CenterType<Feature>*, bool, const CenterType<Feature>*, \
                              Feature*, int64_t, int64_t, const ParallelFor&, Isa);

TCL_INSTANTIATE(float)
TCL_INSTANTIATE(double)
TCL_INSTANTIATE(Half)
TCL_INSTANTIATE(BFloat16)

}  // namespace tcl
