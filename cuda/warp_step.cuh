// The step on a sample, by a warp: residual, loss, and the center of its class where no other warp
// has a sample of that class.

#ifndef TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_
#define TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_

#include <cstdint>

#include "csrc/center_loss_math.h"
#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

template <typename Feature, int Width>
class WarpStep {
 public:
  using Center = CenterType<Feature>;
  static constexpr int kLane = kPerLane<Center, Width>;
  static constexpr int kPass = kColumns<Center, Width>;
  using Share = Center[kLane];  // of a pass over the columns, this lane's numbers

  // What becomes of the residual of a sample.
  enum class Sum {
    kUnused,           // no center moves by it
    kMovesCenter,      // the sample is alone in its class, or with its partner
    kLeft,             // the class's sum is made later
    kAddedAtomically,  // to a row of the pool
  };

  // A sample's rows in one pass over the columns. A pair of one class is done together.
  struct Loaded {
    Share row;
    Share center;
    Share partner_row;
  };

  __device__ explicit WarpStep(const Parameters<Feature>& p) : p_(p) {
    const Center alpha = Alpha();
    moves_ = p.options.update_centers && IsFinite(alpha) && alpha > 0;
  }

  // Whether the sample belongs to a class whose center moves. With alpha = 0 none does, so none is
  // written.
  __device__ bool IsMember(int64_t label) const {
    return moves_ && !p_.Ignored(label) && p_.InTable(label);
  }

  __device__ void SetCounted(int counted) {
    counted_ = counted;
    sample_scale_ = ReductionScale(p_.options.reduction, Weight(), counted);
  }

  // Whether the losses go into mailboxes, to be added up.
  __device__ bool reduces_loss() const {
    return p_.loss != nullptr && p_.options.reduction != Reduction::kNone;
  }

  // The rows of sample i. The center may be loaded before it is known whether another warp moves
  // it; then it is not used.
  __device__ void Load(int i, int64_t label, int64_t column, Loaded* loaded) const {
    LoadRow<Width, Cache::kStreamed>(p_.Features(i), column, p_.dim, loaded->row);
    const bool subtracts = !p_.features_are_residuals && p_.InTable(label);
    LoadRow<Width, Cache::kEarly>(subtracts ? p_.CenterRow(label) : nullptr, column,
                                  subtracts ? p_.dim : 0, loaded->center);
  }
  __device__ void LoadPartner(int partner, int64_t column, Loaded* loaded) const {
    LoadRow<Width, Cache::kStreamed>(p_.Features(partner), column, p_.dim, loaded->partner_row);
  }

  // Does sample i, and its partner if that is not negative. `loaded` is the first pass. Returns how
  // many of them have finite features.
  __device__ int DoSample(int i, int partner, int64_t label, Loaded& loaded, Sum use,
                          int pool_row = 0) {
    if (p_.Ignored(label)) return DoWithout(i, 0);
    if (!p_.InTable(label)) return DoWithout(i, NotANumber());
    const bool is_pair = partner >= 0;
    Center square[2] = {};
#pragma unroll 1
    for (int64_t column = 0;;) {
      square[0] += DoResidual(i, column, loaded.center, loaded.row);
      if (is_pair) square[1] += DoResidual(partner, column, loaded.center, loaded.partner_row);
      column += kPass;
      if (column >= p_.dim) break;
      Load(i, label, column, &loaded);
      if (is_pair) LoadPartner(partner, column, &loaded);
    }
    const Center squares = WarpSums(square);
    const bool stores = Lane() < (is_pair ? 2 : 1);
    const int own = Lane() == 1 ? partner : i;
    if (stores) StoreLoss(own, SampleWeight(own) * (squares / 2), squares);
    if (use == Sum::kUnused) return 0;

    // Where the squares are finite so are the features; otherwise the features are looked at.
    const unsigned looked_at = __ballot_sync(kAllLanes, stores && !IsFinite(squares));
    const bool is_finite = (looked_at & 1) == 0 || RowIsFinite(i);
    if (use == Sum::kLeft) return is_finite;
    const bool adds_partner = is_pair && ((looked_at & 2) == 0 || RowIsFinite(partner));
    const int finite = is_finite + adds_partner;
    if (finite == 0) return 0;
    if (p_.dim <= kPass) {
      UseResiduals(use, label, 0, is_finite, adds_partner, loaded, pool_row);
      return finite;
    }
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Load(i, label, column, &loaded);
      if (adds_partner) LoadPartner(partner, column, &loaded);
#pragma unroll
      for (int e = 0; e < kLane; ++e) {
        loaded.row[e] -= loaded.center[e];
        loaded.partner_row[e] -= loaded.center[e];
      }
      UseResiduals(use, label, column, is_finite, adds_partner, loaded, pool_row);
    }
    return finite;
  }

  // One sample of a class of `count` whose sum is a row of the pool; the last one moves the center
  // and clears the row.
  __device__ void AddAtomically(int i, int64_t label, Loaded& loaded, int count, int row) {
    int finite = DoSample(i, -1, label, loaded, Sum::kAddedAtomically, row);
    if (!LastWarpToArrive(p_.arrivals + row, count, &finite)) return;
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Share sum;
      const Share zeros = {};
      LoadRow<Width, Cache::kShared>(p_.PoolRow(row), column, p_.dim, sum);
      StoreRow<Width, Cache::kNormal>(p_.PoolRow(row), column, p_.dim, zeros);
      Share center;
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      if (finite > 0) MoveCenter(label, column, finite, sum, center);
    }
  }

  __device__ bool RowIsFinite(int i) const {
    bool finite = true;
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Share row;
      LoadRow<Width, Cache::kNormal>(p_.Features(i), column, p_.dim, row);
#pragma unroll
      for (int e = 0; e < kLane; ++e) finite = finite && IsFinite(row[e]);
    }
    return __all_sync(kAllLanes, finite);
  }

  // What the sum of the residuals of a class of `finite` samples is multiplied by.
  __device__ Center Scale(int finite) const {
    return StepScale(p_.options.rule, Alpha(), finite, counted_);
  }

  // The loss, of the sum of the samples' losses; by one thread.
  __device__ void StoreLossSum(double sum) {
    sum *= static_cast<double>(Weight());
    if (p_.options.reduction == Reduction::kMean) {
      sum = counted_ == 0 ? 0 : sum / static_cast<double>(counted_);
    }
    *p_.loss = static_cast<Center>(sum);
  }

 private:
  __device__ static Center NotANumber() { return static_cast<Center>(FloatOf(0x7fc00000u)); }

  // Alpha and loss_weight are loaded each time: that costs less than the registers to keep them.
  __device__ Center Alpha() const {
    return p_.cuda.alpha == nullptr ? p_.options.alpha : *p_.cuda.alpha;
  }
  __device__ Center Weight() const {
    // A kernel cannot raise: a bad alpha shows in the loss.
    if (p_.options.update_centers && !(IsFinite(Alpha()) && Alpha() >= 0)) return NotANumber();
    return p_.cuda.loss_weight == nullptr ? p_.options.loss_weight : *p_.cuda.loss_weight;
  }
  __device__ Center SampleWeight(int i) const {
    return p_.sample_weight == nullptr ? Center{1} : p_.sample_weight[i];
  }

  // An ignored sample, or one whose label is no row of the table.
  __device__ int DoWithout(int i, Center value) {
    if (p_.residual != nullptr) {
      Share row;
#pragma unroll
      for (int e = 0; e < kLane; ++e) row[e] = value;
#pragma unroll 1
      for (int64_t column = 0; column < p_.dim; column += kPass) {
        StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, row);
      }
    }
    if (Lane() == 0) StoreLoss(i, value, value);
    return 0;
  }

  // The residual in place of the features, stored in the step's scale. Returns its squares.
  __device__ Center DoResidual(int i, int64_t column, const Share& center, Share& row) const {
    const Center scale = SampleWeight(i) * sample_scale_;
    Center square = 0;
    Share scaled;
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      row[e] -= center[e];
      square += row[e] * row[e];
      scaled[e] = row[e] * scale;
    }
    if (p_.residual != nullptr) {
      StoreRow<Width, Cache::kStreamed>(p_.residual + i * p_.dim, column, p_.dim, scaled);
    }
    return square;
  }

  // A pass of the residuals of a sample and its partner, those that are finite.
  __device__ void UseResiduals(Sum use, int64_t label, int64_t column, bool adds, bool adds_partner,
                               Loaded& loaded, int pool_row) {
    if (use == Sum::kAddedAtomically) {
#pragma unroll
      for (int v = 0; v < kLane / Width; ++v) {
        const int64_t at = ColumnOf<Width>(column, v);
        if (at < p_.dim) AddVector<Width>(p_.PoolRow(pool_row) + at, loaded.row + v * Width);
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      if (!adds) loaded.row[e] = 0;
      if (adds_partner) loaded.row[e] += loaded.partner_row[e];
    }
    if (p_.features_are_residuals) {
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, loaded.center);
    }
    MoveCenter(label, column, adds + adds_partner, loaded.row, loaded.center);
  }

  __device__ void MoveCenter(int64_t label, int64_t column, int finite, const Share& sum,
                             Share& center) {
    const Center scale = Scale(finite);
#pragma unroll
    for (int e = 0; e < kLane; ++e) center[e] += scale * sum[e];
    StoreRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
  }

  __device__ void StoreLoss(int i, Center loss, Center squares) {
    if (reduces_loss()) {
      Publish(&p_.sample_loss[i], loss);
    } else if (p_.loss != nullptr) {
      p_.loss[i] = loss * sample_scale_;
    }
    if (p_.squared_distance != nullptr) p_.squared_distance[i] = squares;
  }

  const Parameters<Feature>& p_;
  Center sample_scale_ = 0;
  int counted_ = 0;
  bool moves_;
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_WARP_STEP_CUH_
