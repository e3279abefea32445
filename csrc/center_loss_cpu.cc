// The center loss step on the CPU.
//
// Work: labels are grouped (label_groups.h), groups are cut into items of at most kItemMembers
// samples, and items are shared out over the threads by the samples they hold. An item reads its
// samples' features and the class's center once, writes their residuals and sums them in batch
// order. A group that is one item moves its center at once: features and center are still in the
// first-level cache. The sums of a larger group are kept and folded in order when all items are
// done, in parallel over groups and columns, so that a batch of one label keeps every thread busy.
//
// Bytes moved, all labels distinct: B D (features + center read + center written + residual).
//
// Other threads are called for before the labels are grouped: they wake up meanwhile.
//
// Deterministic: which sums are formed, and in which order, follows from the labels alone.

#include "csrc/center_loss_cpu.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "csrc/center_loss_math.h"
#include "csrc/label_groups.h"
#include "csrc/spin.h"

namespace tcl {
namespace {

// Long enough that the sums of a split group are a 1/64th of what is read to form them, short
// enough that a batch of a few hundred samples of one label can be shared out.
constexpr int64_t kItemMembers = 64;

// Above this batch size the labels are grouped before other threads are called for: they would wait
// for longer than it takes them to wake up.
constexpr int64_t kMostWaitedFor = 8192;

// While an item is gone through, one is fetched that comes as many bytes of centers later: with
// short rows the very next one would not come in time, with long ones more would not stay in the
// first-level cache. (Measured for D = 16 to 1024.)
constexpr int64_t kBytesAhead = 2048;
constexpr int64_t kMostItemsAhead = 8;

// The finishing pass is cut by columns in blocks of whole cache lines.
constexpr int64_t kColumnBlock = 256;

// Memory that begins with a cache line: a vector that straddles two takes twice as long.
constexpr std::align_val_t kCacheLine{64};
struct Free {
  void operator()(void* memory) const { operator delete(memory, kCacheLine); }
};
template <typename T>
using Row = std::unique_ptr<T[], Free>;
template <typename T>
Row<T> NewRow(int64_t size) {
  return Row<T>(static_cast<T*>(operator new(static_cast<size_t>(size) * sizeof(T), kCacheLine)));
}

struct Item {
  int64_t group;
  int64_t begin;    // into groups.order()
  int64_t end;      // one past its last sample there
  int64_t partial;  // row of the partial sums, -1 where the group is a single item
};

// A group of several items.
struct SplitGroup {
  int64_t group;
  int64_t first_partial;
  int64_t partials;
};

template <typename Feature, typename Label>
class Step {
 public:
  using Center = CenterType<Feature>;

  Step(const StepArguments<Feature, Label>& step, const ParallelFor& parallel_for, Isa isa)
      : step_(step),
        loops_(GetRowLoops<Feature>(isa)),
        parallel_for_(parallel_for),
        items_ahead_(std::clamp<int64_t>(
            kBytesAhead / std::max<int64_t>(step.dim * static_cast<int64_t>(sizeof(Center)), 1), 1,
            kMostItemsAhead)) {}

  int64_t Run() {
    if (step_.batch > kMostWaitedFor) Prepare();
    const int64_t row_bytes =
        step_.dim * static_cast<int64_t>(sizeof(Feature) + 3 * sizeof(Center));
    parallel_for_(step_.batch, row_bytes, [this](int64_t begin, int64_t end) {
      Prepare();
      if (bad_ >= 0) return;
      RunItems(begin, end);
      ZeroIgnored(begin, end);
    });
    Prepare();  // of an empty batch, too, which may have no range
    if (bad_ >= 0) return bad_;
    FinishSplitGroups();
    ReduceLoss();
    return -1;
  }

 private:
  // What comes before the rows, done by the first thread that is here while the others are still
  // waking up.
  void Prepare() {
    if (prepared_.load(std::memory_order_acquire)) return;
    if (taken_.exchange(true)) {
      // The one that prepares may need this one's processor.
      while (!SpinUntil([this] { return prepared_.load(std::memory_order_acquire); })) {
        std::this_thread::yield();
      }
      return;
    }
    const StepOptions<Center>& options = step_.options;
    bad_ = groups_.Build(step_.labels, step_.batch, step_.classes, options.has_ignore_class,
                         options.ignore_class);
    if (bad_ < 0) {
      // With alpha = 0 no center moves, so none is touched.
      moves_ = options.update_centers && options.alpha != 0;
      sample_scale_ = ReductionScale(options.reduction, options.loss_weight, groups_.counted());
      FindSplitGroups();
      if (step_.loss != nullptr && options.reduction != Reduction::kNone) {
        sample_loss_.reset(new Center[static_cast<size_t>(step_.batch)]);
      }
    }
    prepared_.store(true, std::memory_order_release);
  }

  void FindSplitGroups() {
    if (!moves_ || step_.batch <= kItemMembers) return;
    int64_t partials = 0;
    for (int64_t g = 0; g < groups_.size(); ++g) {
      const int64_t members = groups_.begin(g + 1) - groups_.begin(g);
      if (members <= kItemMembers) continue;
      const int64_t items = (members + kItemMembers - 1) / kItemMembers;
      split_groups_.push_back({g, partials, items});
      partials += items;
    }
    if (partials == 0) return;
    partial_sums_ = NewRow<Center>(partials * step_.dim);
    partial_counts_.reset(new int64_t[static_cast<size_t>(partials)]);
  }

  // The k-th item of the group.
  Item ItemOf(int64_t group, int64_t k) const {
    const int64_t begin = groups_.begin(group), end = groups_.begin(group + 1);
    Item item{group, begin + k * kItemMembers, std::min(begin + (k + 1) * kItemMembers, end), -1};
    if (moves_ && end - begin > kItemMembers) {
      const auto split =
          std::lower_bound(split_groups_.begin(), split_groups_.end(), group,
                           [](const SplitGroup& a, int64_t b) { return a.group < b; });
      item.partial = split->first_partial + k;
    }
    return item;
  }

  // The first item of the group that begins at `position` or later, else the next group's first;
  // an empty one at the end.
  Item ItemFrom(int64_t group, int64_t position) const {
    const int64_t k = (position - groups_.begin(group) + kItemMembers - 1) / kItemMembers;
    if (groups_.begin(group) + k * kItemMembers < groups_.begin(group + 1)) return ItemOf(group, k);
    if (group + 1 < groups_.size()) return ItemOf(group + 1, 0);
    return {groups_.size(), groups_.counted(), groups_.counted(), -1};
  }

  // Items that begin in [begin, end) of the grouped order.
  void RunItems(int64_t begin, int64_t end) {
    end = std::min(end, groups_.counted());
    if (begin >= end) return;
    Item item = ItemFrom(groups_.Find(begin), begin);
    if (item.begin >= end) return;
    alignas(64) Center small[kColumnBlock];
    Row<Center> large;
    if (moves_ && step_.dim > kColumnBlock) large = NewRow<Center>(step_.dim);
    RowArguments<Feature> rows;
    rows.features = step_.features;
    rows.sample_weight = step_.sample_weight;
    rows.scale = sample_scale_;
    rows.residual = step_.residual;
    Item later = item;
    for (int64_t k = 0; k < items_ahead_; ++k) {
      NameLater(&later, end, &rows);
      loops_.fetch(rows, step_.dim);
    }
    while (item.begin < end) {
      rows.rows = item.end - item.begin;
      rows.positions = groups_.order() + item.begin;
      rows.centers = CenterOf(item);
      rows.sum = item.partial >= 0  ? partial_sums_.get() + item.partial * step_.dim
                 : large != nullptr ? large.get()
                                    : small;
      NameLater(&later, end, &rows);
      RunItem(item, rows);
      item = ItemFrom(item.group, item.end);
    }
  }

  // Names the item as the one to fetch and goes on to the next. At the end of the range, beyond
  // which another thread may be at work, the last one stays named.
  void NameLater(Item* item, int64_t end, RowArguments<Feature>* rows) const {
    if (item->begin >= end) return;
    rows->later_rows = static_cast<int>(std::min<int64_t>(item->end - item->begin, kRowsTogether));
    rows->later_positions = groups_.order() + item->begin;
    rows->later_centers = CenterOf(*item);
    *item = ItemFrom(item->group, item->end);
  }

  const Center* CenterOf(const Item& item) const {
    if (step_.features_are_residuals) return nullptr;
    return step_.centers + groups_.label(item.group) * step_.dim;
  }

  void RunItem(const Item& item, const RowArguments<Feature>& rows) {
    Center squares[kItemMembers];
    loops_.residual(rows, moves_ ? Sum::kStart : Sum::kNone, step_.dim, squares);
    int64_t count = rows.rows;  // of those that are finite
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t i = rows.positions[r];
      StoreLoss(i, SampleWeight(i) * (squares[r] / 2));
      if (step_.squared_distance != nullptr) step_.squared_distance[i] = squares[r];
      // Finite squares prove finite features; only otherwise the row itself has to be asked.
      if (!IsFinite(squares[r])) count -= !IsFiniteSample(i);
    }
    if (!moves_) return;
    if (count < rows.rows) SumFiniteMembers(rows);
    if (item.partial >= 0) {
      partial_counts_[static_cast<size_t>(item.partial)] = count;
    } else if (count > 0) {
      MoveCenter(item.group, count, rows.sum, 0, step_.dim);
    }
  }

  // The sum of the item's residuals again, without the members that hold a NaN or an infinity.
  void SumFiniteMembers(const RowArguments<Feature>& rows) {
    std::fill_n(rows.sum, step_.dim, Center{0});
    RowArguments<Feature> row = rows;
    row.rows = 1;
    row.residual = nullptr;
    for (; row.positions < rows.positions + rows.rows; ++row.positions) {
      Center squares;
      if (IsFiniteSample(*row.positions)) loops_.residual(row, Sum::kAdd, step_.dim, &squares);
    }
  }

  bool IsFiniteSample(int64_t i) const {
    return loops_.all_finite(step_.features + i * step_.dim, step_.dim);
  }

  void MoveCenter(int64_t group, int64_t count, const Center* sum, int64_t column,
                  int64_t columns) {
    const StepOptions<Center>& options = step_.options;
    loops_.move(step_.centers + groups_.label(group) * step_.dim + column,
                StepScale(options.rule, options.alpha, count, groups_.counted()), sum, columns);
  }

  void FinishSplitGroups() {
    if (split_groups_.empty()) return;
    const int64_t blocks = (step_.dim + kColumnBlock - 1) / kColumnBlock;
    const int64_t bytes = kItemMembers * kColumnBlock * static_cast<int64_t>(sizeof(Center));
    parallel_for_(static_cast<int64_t>(split_groups_.size()) * blocks, bytes,
                  [this, blocks](int64_t begin, int64_t end) {
                    for (int64_t k = begin; k < end; ++k) {
                      FinishColumns(split_groups_[static_cast<size_t>(k / blocks)],
                                    k % blocks * kColumnBlock);
                    }
                  });
  }

  void FinishColumns(const SplitGroup& split, int64_t column) {
    const int64_t columns = std::min(kColumnBlock, step_.dim - column);
    Center sum[kColumnBlock] = {};
    int64_t count = 0;
    for (int64_t p = split.first_partial; p < split.first_partial + split.partials; ++p) {
      // An item without one finite member has nothing in its sum.
      loops_.add(sum, partial_sums_.get() + p * step_.dim + column, columns);
      count += partial_counts_[static_cast<size_t>(p)];
    }
    if (count > 0) MoveCenter(split.group, count, sum, column, columns);
  }

  void StoreLoss(int64_t i, Center loss) {
    if (sample_loss_ != nullptr) {
      sample_loss_[static_cast<size_t>(i)] = loss;
    } else if (step_.loss != nullptr) {
      step_.loss[i] = loss * sample_scale_;
    }
  }

  void ZeroIgnored(int64_t begin, int64_t end) {
    for (int64_t k = std::max(begin, groups_.counted()); k < end; ++k) {
      const int64_t i = groups_.order()[k];
      StoreLoss(i, 0);
      if (step_.squared_distance != nullptr) step_.squared_distance[i] = 0;
      if (step_.residual != nullptr) {
        std::fill_n(step_.residual + i * step_.dim, step_.dim, Center{0});
      }
    }
  }

  // In batch order and in double: the loss is rounded once.
  void ReduceLoss() {
    if (sample_loss_ == nullptr) return;
    double sum = 0;
    for (int64_t i = 0; i < step_.batch; ++i) sum += sample_loss_[static_cast<size_t>(i)];
    sum *= step_.options.loss_weight;
    if (step_.options.reduction == Reduction::kMean) {
      sum = groups_.counted() == 0 ? 0 : sum / static_cast<double>(groups_.counted());
    }
    *step_.loss = static_cast<Center>(sum);
  }

  Center SampleWeight(int64_t i) const {
    return step_.sample_weight == nullptr ? Center{1} : step_.sample_weight[i];
  }

  const StepArguments<Feature, Label>& step_;
  const RowLoops<Feature>& loops_;
  const ParallelFor& parallel_for_;
  const int64_t items_ahead_;
  std::atomic<bool> taken_{false}, prepared_{false};
  LabelGroups groups_;
  int64_t bad_ = -1;
  bool moves_ = false;
  Center sample_scale_ = 0;
  std::vector<SplitGroup> split_groups_;
  Row<Center> partial_sums_;  // [partials, D]
  std::unique_ptr<int64_t[]> partial_counts_;
  std::unique_ptr<Center[]> sample_loss_;  // [B], unless the caller takes them one by one
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

bool Supported(Isa isa) {
#if defined(TCL_HAVE_X86_ISAS)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return Supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa BestIsa() {
  static const Isa best = Supported(Isa::kAvx512) ? Isa::kAvx512
                          : Supported(Isa::kAvx2) ? Isa::kAvx2
                                                  : Isa::kBaseline;
  return best;
}

template <typename Feature>
const RowLoops<Feature>& GetRowLoops(Isa isa) {
#if defined(TCL_HAVE_X86_ISAS)
  if (isa == Isa::kAvx512) return avx512::Loops<Feature>();
  if (isa == Isa::kAvx2) return avx2::Loops<Feature>();
#endif
  return baseline::Loops<Feature>();
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
