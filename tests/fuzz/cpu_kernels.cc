// Random steps of the CPU kernels, for tests/test_fuzz_kernels.py, which builds it with sanitizers.
//
//   cpu_kernels FIRST_SEED CASES SECONDS
//
// runs CASES seeds, or as many as SECONDS allow if that is not 0. A seed decides shapes, types,
// options, labels (hostile ones too) and numbers. Each case runs with every instruction set and
// with one thread and several, and is compared with the formula, number by number. A case that
// fails prints its seed; `cpu_kernels SEED 1 0` repeats it.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "csrc/center_loss.h"
#include "csrc/center_loss_cpu.h"
#include "csrc/center_loss_math.h"
#include "csrc/isa.h"
#include "csrc/label_segments.h"
#include "csrc/thread_pool.h"
#include "tests/fuzz/guarded.h"

namespace {

using tcl::Isa;
using tcl::ParallelFor;
using tcl::Reduction;
using tcl::Rule;
using tcl::Work;

uint64_t current_seed = 0;
std::string current_case;

[[noreturn]] void Fail(const std::string& what) {
  std::printf("seed %llu: %s\n  %s\n", static_cast<unsigned long long>(current_seed), what.c_str(),
              current_case.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Below(int64_t limit) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(limit));
  }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  double Normal() { return normal_(engine_); }
  template <typename T>
  T Of(std::initializer_list<T> values) {
    return values.begin()[Below(static_cast<int64_t>(values.size()))];
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// Several threads on ranges of their own, in any number and order; also the pool of the op, with
// helpers that may start after the call has returned.
class Threads {
 public:
  explicit Threads(int64_t threads) : threads_(threads) {}
  ~Threads() {
    for (std::thread& helper : helpers_) helper.join();
  }

  ParallelFor Ranges() {
    return [this](int64_t total, int64_t, const Work& work) {
      const int64_t ranges = threads_ + 1;
      std::vector<std::thread> running;
      for (int64_t r = 0; r < ranges; ++r) {
        running.emplace_back([=, &work] {
          // In halves: a thread may be given several ranges.
          const int64_t begin = total * r / ranges, end = total * (r + 1) / ranges;
          const int64_t middle = (begin + end) / 2;
          if (middle < end) work(middle, end);
          if (begin < middle) work(begin, middle);
        });
      }
      for (std::thread& thread : running) thread.join();
    };
  }

  ParallelFor Pool() {
    const auto schedule = [this](auto task, bool) { helpers_.emplace_back(task); };
    const ParallelFor pool = tcl::MakeParallelFor(schedule, threads_);
    // As much memory traffic as it takes to use all threads.
    return [pool](int64_t total, int64_t, const Work& work) {
      pool(total, tcl::kMinBytesPerThread, work);
    };
  }

 private:
  const int64_t threads_;
  std::vector<std::thread> helpers_;
};

ParallelFor Alone() {
  return [](int64_t total, int64_t, const Work& work) {
    if (total > 0) work(0, total);
  };
}

std::vector<Isa> Isas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (tcl::IsSupported(isa)) isas.push_back(isa);
  }
  return isas;
}

// Distinct labels below `classes` whose search begins in the last slots of the hash table of a
// batch, so that it goes on at the first slots. The hash is that of label_segments.cc.
std::vector<int64_t> LabelsOfLastSlots(int64_t batch, int64_t classes, int64_t wanted) {
  int bits = 1;
  while ((int64_t{1} << bits) < 4 * batch) ++bits;
  std::vector<int64_t> labels;
  for (int64_t label = 0; label < classes && static_cast<int64_t>(labels.size()) < wanted;
       ++label) {
    const uint64_t hash = static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u;
    if (hash >> (64 - bits) >= (uint64_t{1} << bits) - 2) labels.push_back(label);
  }
  return labels;
}

template <typename Label>
std::vector<int64_t> HostileLabels(int64_t classes) {
  using Limits = std::numeric_limits<Label>;
  std::vector<int64_t> hostile = {-1, classes, classes + 1, Limits::min(), Limits::max()};
  if (sizeof(Label) == 8) {
    for (int64_t label : {int64_t{1} << 31, int64_t{1} << 32, (int64_t{1} << 32) + classes - 1,
                          -(int64_t{1} << 32), int64_t{Limits::min()} + 1}) {
      hostile.push_back(label);
    }
  }
  return hostile;
}

template <typename T>
std::unique_ptr<Guarded<T>> New(Random* random, int64_t size, T value) {
  auto array = std::make_unique<Guarded<T>>(size, !random->OneIn(4));
  for (int64_t i = 0; i < size; ++i) (*array)[i] = value;
  return array;
}

template <typename Feature, typename Label>
class Case {
 public:
  using Center = tcl::CenterType<Feature>;
  using Arguments = tcl::StepArguments<Feature, Label>;

  explicit Case(Random* random) : random_(random) {
    Shape();
    Options();
    Labels();
    Numbers();
    current_case =
        "batch " + std::to_string(batch_) + ", dim " + std::to_string(dim_) + ", classes " +
        std::to_string(classes_) + ", feature of " + std::to_string(sizeof(Feature)) +
        " bytes, label of " + std::to_string(sizeof(Label)) + ", rule " +
        std::to_string(static_cast<int>(options_.rule)) + ", reduction " +
        std::to_string(static_cast<int>(options_.reduction)) + ", ignore " +
        (options_.has_ignore_class ? std::to_string(options_.ignore_class) : "none") + ", alpha " +
        std::to_string(options_.alpha) + (options_.update_centers ? ", moving" : ", reading") +
        (from_residual_ ? ", from residuals" : "") + (weights_ ? ", weights" : "");
  }

  void Run() {
    const std::unique_ptr<Outcome> first = Step(Alone(), Isa::kBaseline);
    Compare(*first);
    for (Isa isa : Isas()) {
      Threads threads(1 + random_->Below(4));
      const ParallelFor ways[] = {Alone(), threads.Ranges(), threads.Pool()};
      const std::unique_ptr<Outcome> outcome = Step(ways[random_->Below(3)], isa);
      if (outcome->invalid != first->invalid || !outcome->centers->HasBitsOf(*first->centers) ||
          !outcome->loss->HasBitsOf(*first->loss) ||
          !outcome->residual->HasBitsOf(*first->residual) ||
          !outcome->squares->HasBitsOf(*first->squares)) {
        Fail("other bits with instruction set " + std::to_string(static_cast<int>(isa)));
      }
      Backward(*first, threads.Ranges(), isa);
    }
  }

 private:
  struct Outcome {
    int64_t invalid;
    std::unique_ptr<Guarded<Center>> centers, loss, residual, squares;
  };

  static constexpr Center kUntouched = -77;

  void Shape() {
    batch_ = random_->Of<int64_t>({0, 1, 2, 3, 5, 8, 17, 40, 63, 64, 65, 66, 128, 129, 200});
    dim_ = random_->Of<int64_t>({0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100});
    if (random_->OneIn(12)) dim_ = random_->Of<int64_t>({255, 256, 257, 511, 513});
    if (random_->OneIn(40)) batch_ = random_->Of<int64_t>({1000, 8192, 8193});
    if (batch_ > 500) dim_ = std::min<int64_t>(dim_, 9);
    classes_ = random_->Of<int64_t>({1, 2, 3, 10, 100, 1000});
    if (random_->OneIn(8)) classes_ = random_->Of<int64_t>({0, 4 * batch_, 4 * batch_ + 1});
  }

  void Options() {
    options_.rule = random_->Of({Rule::kPaper, Rule::kMean, Rule::kSum, Rule::kBatchMean,
                                 Rule::kPaperBatchMean, Rule::kTutorial});
    options_.reduction = random_->Of({Reduction::kSum, Reduction::kMean, Reduction::kNone});
    options_.alpha = static_cast<Center>(random_->Of({0.0, 0.3, 0.5, 1.0, 1.5}));
    options_.loss_weight = static_cast<Center>(random_->Of({1.0, 1.0, 0.25, 0.0}));
    options_.update_centers = !random_->OneIn(4);
    from_residual_ = std::is_same_v<Feature, Center> && random_->OneIn(6);
    if (from_residual_) options_.update_centers = true;
  }

  void Labels() {
    const int64_t pattern = random_->Below(6);
    std::vector<int64_t> last;
    if (pattern == 3) last = LabelsOfLastSlots(batch_, classes_, 6);
    const int64_t one = classes_ == 0 ? 0 : random_->Below(classes_);
    ids_.resize(static_cast<size_t>(batch_));
    for (int64_t& id : ids_) {
      if (classes_ == 0) {
        id = 0;
      } else if (pattern == 0) {
        id = one;
      } else if (pattern == 1) {
        id = random_->OneIn(2) ? one : random_->Below(classes_);
      } else if (pattern == 2) {
        id = std::min(random_->Below(classes_), random_->Below(classes_));
      } else if (!last.empty()) {
        id = last[static_cast<size_t>(random_->Below(static_cast<int64_t>(last.size())))];
      } else {
        id = random_->Below(classes_);
      }
    }
    const std::vector<int64_t> hostile = HostileLabels<Label>(classes_);
    if (random_->OneIn(2)) {
      options_.has_ignore_class = true;
      options_.ignore_class = random_->OneIn(2) ? one : random_->Of({-1L, 1L << 32, 1L << 31});
      if (random_->OneIn(2)) {
        options_.ignore_class =
            hostile[static_cast<size_t>(random_->Below(static_cast<int64_t>(hostile.size())))];
      }
      const bool fits = options_.ignore_class == static_cast<Label>(options_.ignore_class);
      for (int64_t& id : ids_) {
        if (fits && random_->OneIn(4)) id = options_.ignore_class;
      }
    }
    if (batch_ > 0 && random_->OneIn(4)) {
      for (int64_t k = 1 + random_->Below(2); k > 0; --k) {
        ids_[static_cast<size_t>(random_->Below(batch_))] =
            hostile[static_cast<size_t>(random_->Below(static_cast<int64_t>(hostile.size())))];
      }
    }
    labels_ = New<Label>(random_, batch_, 0);
    for (int64_t i = 0; i < batch_; ++i) {
      (*labels_)[i] = static_cast<Label>(ids_[static_cast<size_t>(i)]);
    }
    labels_->MakeReadOnly();
  }

  void Numbers() {
    const Center far = random_->OneIn(4) ? 100 : 0;
    features_ = New<Feature>(random_, batch_ * dim_, Feature{});
    for (int64_t k = 0; k < batch_ * dim_; ++k) {
      (*features_)[k] = tcl::Round<Feature>(far + static_cast<Center>(random_->Normal()));
    }
    if (batch_ * dim_ > 0 && random_->OneIn(3)) {
      for (int64_t k = random_->Below(4); k >= 0; --k) {
        const Center bad = random_->Of<Center>({std::numeric_limits<Center>::quiet_NaN(),
                                                std::numeric_limits<Center>::infinity(),
                                                -std::numeric_limits<Center>::infinity()});
        (*features_)[random_->Below(batch_ * dim_)] = tcl::Round<Feature>(bad);
      }
    }
    if (batch_ * dim_ > 0 && random_->OneIn(8)) {  // finite, but its square is not
      const Center huge = static_cast<Center>(std::is_same_v<Center, float> ? 1e30 : 1e200);
      (*features_)[random_->Below(batch_ * dim_)] = tcl::Round<Feature>(huge);
    }
    features_->MakeReadOnly();
    centers_ = New<Center>(random_, classes_ * dim_, 0);
    for (int64_t k = 0; k < classes_ * dim_; ++k) {
      (*centers_)[k] = far + static_cast<Center>(random_->Normal());
    }
    centers_->MakeReadOnly();
    if (random_->OneIn(2)) {
      weights_ = New<Center>(random_, batch_, 0);
      for (int64_t i = 0; i < batch_; ++i) {
        (*weights_)[i] = random_->OneIn(4) ? Center{0} : static_cast<Center>(random_->Normal());
      }
      weights_->MakeReadOnly();
    }
    has_loss_ = !random_->OneIn(5);
    has_residual_ = !from_residual_ && !random_->OneIn(5);
    has_squares_ = random_->OneIn(2);
  }

  std::unique_ptr<Outcome> Step(const ParallelFor& threads, Isa isa) {
    auto out = std::make_unique<Outcome>();
    const bool per_sample = options_.reduction == Reduction::kNone;
    out->loss = New<Center>(random_, per_sample ? batch_ : 1, kUntouched);
    out->residual = New<Center>(random_, batch_ * dim_, kUntouched);
    out->squares = New<Center>(random_, batch_, kUntouched);
    out->centers = New<Center>(random_, classes_ * dim_, 0);
    out->centers->CopyFrom(*centers_);
    if (!options_.update_centers || options_.alpha == 0) out->centers->MakeReadOnly();
    Arguments step;
    step.batch = batch_;
    step.dim = dim_;
    step.classes = classes_;
    step.features = features_->data();
    step.labels = labels_->data();
    step.sample_weight = weights_ ? weights_->data() : nullptr;
    step.centers = out->centers->data();
    step.loss = has_loss_ ? out->loss->data() : nullptr;
    step.residual = has_residual_ ? out->residual->data() : nullptr;
    step.squared_distance = has_squares_ ? out->squares->data() : nullptr;
    step.features_are_residuals = from_residual_;
    step.options = options_;
    out->invalid = tcl::CenterLossOnCpu(step, threads, isa);
    return out;
  }

  bool Ignored(int64_t i) const {
    return options_.has_ignore_class && ids_[static_cast<size_t>(i)] == options_.ignore_class;
  }

  double Feature64(int64_t i, int64_t d) const {
    return static_cast<double>(tcl::Widen((*features_)[i * dim_ + d]));
  }

  double Center64(int64_t j, int64_t d) const {
    return from_residual_ ? 0.0 : static_cast<double>((*centers_)[j * dim_ + d]);
  }

  static void Near(double actual, double truth, double bound, const std::string& what) {
    if (std::isfinite(truth) ? !(std::abs(actual - truth) <= bound)
                             : (std::isfinite(actual) || std::isnan(actual) != std::isnan(truth))) {
      Fail(what + " is " + std::to_string(actual) + ", expected " + std::to_string(truth) +
           " within " + std::to_string(bound));
    }
  }

  // The results of one thread against the formula in float64.
  void Compare(const Outcome& out) {
    int64_t invalid = -1, counted = 0;
    for (int64_t i = batch_ - 1; i >= 0; --i) {
      if (Ignored(i)) continue;
      ++counted;
      const int64_t id = ids_[static_cast<size_t>(i)];
      if (id < 0 || id >= classes_) invalid = i;
    }
    if (out.invalid != invalid) {
      Fail("first invalid label at " + std::to_string(out.invalid) + ", expected " +
           std::to_string(invalid));
    }
    const bool failed = invalid >= 0;
    const double unit = static_cast<double>(std::numeric_limits<Center>::epsilon());
    const double share =
        options_.reduction == Reduction::kMean ? (counted == 0 ? 0.0 : 1.0 / double(counted)) : 1.0;
    const double scale = static_cast<double>(options_.loss_weight) * share;
    double total = 0, total_bound = 0;
    struct Moved {
      int64_t samples = 0;
      std::vector<double> sum, size;
    };
    std::map<int64_t, Moved> moved;
    for (int64_t i = 0; i < batch_; ++i) {
      const std::string at = " of sample " + std::to_string(i);
      const int64_t id = ids_[static_cast<size_t>(i)];
      const double weight = weights_ ? static_cast<double>((*weights_)[i]) : 1.0;
      double square = 0, size = 0;
      bool finite = true;
      for (int64_t d = 0; d < dim_ && !failed && !Ignored(i); ++d) {
        const double residual = Feature64(i, d) - Center64(id, d);
        finite = finite && std::isfinite(Feature64(i, d));
        square += residual * residual;
        const double numbers = std::abs(Feature64(i, d)) + std::abs(Center64(id, d));
        size += numbers * numbers;
        if (has_residual_) {
          Near(double(out.residual->data()[i * dim_ + d]), scale * weight * residual,
               4 * unit * std::abs(scale * weight) * numbers, "residual" + at);
        }
      }
      if (!failed && Ignored(i)) {
        for (int64_t d = 0; d < dim_ && has_residual_; ++d) {
          Near(double(out.residual->data()[i * dim_ + d]), 0, 0, "ignored residual" + at);
        }
      }
      if (square > double(std::numeric_limits<Center>::max())) {
        square = std::numeric_limits<double>::infinity();
      }
      const double bound = (double(dim_) + 8) * unit * std::abs(weight) * size;
      if (failed || !has_squares_) {
        Near(double((*out.squares)[i]), double(kUntouched), 0, "untouched square" + at);
      } else {
        Near(double((*out.squares)[i]), square, (double(dim_) + 8) * unit * size, "square" + at);
      }
      if (Ignored(i)) square = 0;
      const double loss = Ignored(i) ? 0.0 : weight * square / 2;
      total += loss;
      total_bound += bound;
      if (options_.reduction == Reduction::kNone) {
        const bool written = has_loss_ && !failed;
        Near(double((*out.loss)[i]), written ? scale * loss : double(kUntouched),
             written ? std::abs(scale) * bound : 0, "loss" + at);
      }
      if (failed || Ignored(i) || !finite) continue;
      Moved& m = moved[id];
      m.sum.resize(static_cast<size_t>(dim_));
      m.size.resize(static_cast<size_t>(dim_));
      ++m.samples;
      for (int64_t d = 0; d < dim_; ++d) {
        m.sum[size_t(d)] += Feature64(i, d) - Center64(id, d);
        m.size[size_t(d)] += std::abs(Feature64(i, d)) + std::abs(Center64(id, d));
      }
    }
    if (options_.reduction != Reduction::kNone) {
      const bool written = has_loss_ && !failed;
      Near(double((*out.loss)[0]), written ? scale * total : double(kUntouched),
           written ? std::abs(scale) * total_bound + unit * std::abs(scale * total) : 0, "loss");
    }
    if (failed || !has_residual_) {
      for (int64_t k = 0; k < batch_ * dim_; ++k) {
        Near(double((*out.residual)[k]), double(kUntouched), 0, "untouched residual");
      }
    }
    if (failed || !options_.update_centers) moved.clear();
    for (int64_t j = 0; j < classes_; ++j) {
      const auto m = moved.find(j);
      for (int64_t d = 0; d < dim_; ++d) {
        double truth = double((*centers_)[j * dim_ + d]), bound = 0;
        if (m != moved.end()) {
          const double s = tcl::StepScale<double>(options_.rule, double(options_.alpha),
                                                  m->second.samples, counted);
          bound = (double(m->second.samples) + 8) * unit *
                  (std::abs(truth) + std::abs(s) * m->second.size[size_t(d)]);
          truth += s * m->second.sum[size_t(d)];
        }
        Near(double((*out.centers)[j * dim_ + d]), truth, bound, "center " + std::to_string(j));
      }
    }
  }

  // upstream times residual; `out` is of the first step.
  void Backward(const Outcome& out, const ParallelFor& threads, Isa isa) {
    const bool per_sample = random_->OneIn(2);
    const auto upstream = New<Center>(random_, per_sample ? batch_ : 1, Center{1.25});
    for (int64_t i = 0; i < upstream->size(); ++i) {
      (*upstream)[i] = static_cast<Center>(random_->Normal());
    }
    const auto gradient = New<Feature>(random_, batch_ * dim_, Feature{});
    upstream->MakeReadOnly();
    tcl::BackwardOnCpu<Feature>(upstream->data(), per_sample, out.residual->data(),
                                gradient->data(), batch_, dim_, threads, isa);
    for (int64_t k = 0; k < batch_ * dim_; ++k) {
      const Center factor = (*upstream)[per_sample ? k / dim_ : 0];
      const Feature expected = tcl::Round<Feature>(factor * (*out.residual)[k]);
      const double actual = double(tcl::Widen((*gradient)[k]));
      if (std::isnan(actual) ? !std::isnan(double(tcl::Widen(expected)))
                             : actual != double(tcl::Widen(expected))) {
        Fail("gradient " + std::to_string(k) + " is " + std::to_string(actual) + ", expected " +
             std::to_string(double(tcl::Widen(expected))));
      }
    }
  }

  Random* const random_;
  int64_t batch_ = 0, dim_ = 0, classes_ = 0;
  tcl::StepOptions<Center> options_;
  bool from_residual_ = false, has_loss_ = true, has_residual_ = true, has_squares_ = true;
  std::vector<int64_t> ids_;
  std::unique_ptr<Guarded<Label>> labels_;
  std::unique_ptr<Guarded<Feature>> features_;
  std::unique_ptr<Guarded<Center>> centers_, weights_;
};

// Sorts several batches with one object, whose memory then holds the numbers of the batch before.
void SortLabels(Random* random) {
  tcl::LabelSegments segments;
  for (int64_t round = 0; round < 4; ++round) {
    const int64_t batch = random->Of<int64_t>({1, 2, 7, 16, 40, 63, 64, 65, 100, 300});
    const int64_t classes = random->Of<int64_t>({1, 5, 100, 4 * batch, 100000});
    std::vector<int64_t> last = LabelsOfLastSlots(batch, classes, batch);
    const bool collide = !last.empty() && random->OneIn(2);
    std::vector<int64_t> labels(static_cast<size_t>(batch)), distinct, sorted, begins;
    for (int64_t& label : labels) {
      label = collide ? last[static_cast<size_t>(random->Below(static_cast<int64_t>(last.size())))]
                      : random->Below(classes);
    }
    const bool has_ignore = random->OneIn(2);
    const int64_t ignore = labels[0];
    current_case = "sort " + std::to_string(batch) + " labels of " + std::to_string(classes) +
                   (collide ? " classes in the last slots" : " classes");
    if (segments.Build(labels.data(), batch, classes, has_ignore, ignore) != -1) {
      Fail("a label is called invalid");
    }
    for (int64_t label : labels) {
      const bool known = std::find(distinct.begin(), distinct.end(), label) != distinct.end();
      if (!known && !(has_ignore && label == ignore)) distinct.push_back(label);
    }
    for (int64_t label : distinct) {
      begins.push_back(static_cast<int64_t>(sorted.size()));
      for (int64_t i = 0; i < batch; ++i) {
        if (labels[static_cast<size_t>(i)] == label) sorted.push_back(i);
      }
    }
    const int64_t counted = static_cast<int64_t>(sorted.size());
    begins.push_back(counted);
    for (int64_t i = 0; i < batch; ++i) {
      if (has_ignore && labels[static_cast<size_t>(i)] == ignore) sorted.push_back(i);
    }
    if (segments.size() != static_cast<int64_t>(distinct.size()) || segments.counted() != counted ||
        !std::equal(sorted.begin(), sorted.end(), segments.positions())) {
      Fail("the labels are not sorted by their first occurrence");
    }
    for (int64_t s = 0; s <= segments.size(); ++s) {
      if (segments.begin(s) != begins[static_cast<size_t>(s)]) Fail("the begin of a segment");
      if (s == segments.size()) break;
      if (segments.label(s) != distinct[static_cast<size_t>(s)]) Fail("the label of a segment");
      if (segments.SegmentAt(segments.begin(s)) != s ||
          segments.SegmentAt(segments.begin(s + 1) - 1) != s) {
        Fail("the segment of a position");
      }
    }
  }
}

template <typename Feature>
void RunCase(Random* random) {
  if (random->OneIn(2)) {
    Case<Feature, int32_t>(random).Run();
  } else {
    Case<Feature, int64_t>(random).Run();
  }
}

void RunSeed(uint64_t seed) {
  current_seed = seed;
  Random random(seed);
  if (random.OneIn(8)) SortLabels(&random);
  switch (random.Below(4)) {
    case 0:
      return RunCase<tcl::Half>(&random);
    case 1:
      return RunCase<tcl::BFloat16>(&random);
    case 2:
      return RunCase<double>(&random);
    default:
      return RunCase<float>(&random);
  }
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments != 4) {
    std::fprintf(stderr, "usage: cpu_kernels FIRST_SEED CASES SECONDS\n");
    return 2;
  }
  const uint64_t first = std::strtoull(argument[1], nullptr, 10);
  const uint64_t cases = std::strtoull(argument[2], nullptr, 10);
  const std::chrono::duration<double> limit(std::atof(argument[3]));
  const auto start = std::chrono::steady_clock::now();
  uint64_t done = 0;
  while (limit.count() > 0 ? std::chrono::steady_clock::now() - start < limit : done < cases) {
    RunSeed(first + done++);
  }
  std::printf("%llu cases\n", static_cast<unsigned long long>(done));
  return 0;
}
