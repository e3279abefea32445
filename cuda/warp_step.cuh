// The work on one sample, or on both samples of a pair, done by one warp: it reads the features and
// the center, stores the scaled residual, and publishes the loss. If no other warp has a sample of
// the class, it also moves the center. A row longer than kPass columns takes several passes,
// because the registers hold only one pass.

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
  using Fragment = Center[kLane];  // this lane's numbers of one pass

  // What a sample's residual is used for, besides the scaled residual that is stored.
  enum class Use {
    kNone,        // nothing
    kMoveCenter,  // it moves the center, with the partner's: no other sample has the class
    kDefer,       // nothing yet: the class is large, and ClassSums computes the residual again
    kAddAtomic,   // it is added to the class's partial sum with atomicAdd
  };

  // The rows of a sample, or of a pair, in one pass.
  struct Rows {
    Fragment row;  // features, then the residual; as is partner_row
    Fragment center;
    Fragment partner_row;
  };

  __device__ explicit WarpStep(const Parameters<Feature>& p) : p_(p) {
    const Center alpha = Alpha();
    moves_ = p.options.update_centers && IsFinite(alpha) && alpha > 0;
  }

  // Whether the step moves the center of this label. With alpha = 0 it writes no center.
  __device__ bool MovesCenter(int64_t label) const {
    return moves_ && !p_.Ignored(label) && p_.InTable(label);
  }

  __device__ void SetCounted(int counted) {
    counted_ = counted;
    sample_scale_ = ReductionScale(p_.options.reduction, Weight(), counted);
  }

  // Whether the losses go to mailboxes and are added up.
  __device__ bool reduces_loss() const {
    return p_.loss != nullptr && p_.options.reduction != Reduction::kNone;
  }

  // Loads the rows of sample i, perhaps before the other samples of its class are known. If another
  // warp turns out to process the sample as a partner, that warp may be moving the center now, and
  // the value loaded here is not used.
  __device__ void Load(int i, int64_t label, int64_t column, Rows* rows) const {
    LoadRow<Width, Cache::kStreamed>(p_.Features(i), column, p_.dim, rows->row);
    // If no center is subtracted, a row of length 0 is loaded: `center` becomes zero, so that
    // row - center is the residual in every case.
    const bool subtracts = !p_.features_are_residuals && p_.InTable(label);
    LoadRow<Width, Cache::kSpeculative>(subtracts ? p_.CenterRow(label) : nullptr, column,
                                        subtracts ? p_.dim : 0, rows->center);
  }
  __device__ void LoadPartner(int partner, int64_t column, Rows* rows) const {
    LoadRow<Width, Cache::kStreamed>(p_.Features(partner), column, p_.dim, rows->partner_row);
  }

  // Processes sample i, and its partner unless that is negative. `rows` holds the first pass.
  // `partial_sum` is the row of the class's partial sum (Use::kAddAtomic). Returns how many of the
  // samples have finite features, or 0 for Use::kNone.
  __device__ int ProcessSample(int i, int partner, int64_t label, Rows& rows, Use use,
                               int partial_sum = 0) {
    if (p_.Ignored(label)) return StoreConstant(i, 0);
    if (!p_.InTable(label)) return StoreConstant(i, NotANumber());
    const bool is_pair = partner >= 0;
    Center square[2] = {};
#pragma unroll 1
    for (int64_t column = 0;;) {
      square[0] += StoreResidual(i, column, rows.center, rows.row);
      if (is_pair) square[1] += StoreResidual(partner, column, rows.center, rows.partner_row);
      column += kPass;
      if (column >= p_.dim) break;
      Load(i, label, column, &rows);
      if (is_pair) LoadPartner(partner, column, &rows);
    }
    // Lane 0 has the sample's sum, position and loss, lane 1 the partner's.
    const Center squares = WarpSums(square);
    const bool stores = Lane() < (is_pair ? 2 : 1);
    const int own = Lane() == 1 ? partner : i;
    if (stores) StoreLoss(own, SampleWeight(own) * (squares / 2), squares);
    if (use == Use::kNone) return 0;

    // Finite squares imply finite features. The converse fails on overflow: then check the row. Bit
    // 0 is the sample's, bit 1 the partner's.
    const unsigned unsure = __ballot_sync(kAllLanes, stores && !IsFinite(squares));
    const bool is_finite = (unsure & 1) == 0 || RowIsFinite(i);
    if (use == Use::kDefer) return is_finite;
    const bool adds_partner = is_pair && ((unsure & 2) == 0 || RowIsFinite(partner));
    const int finite = is_finite + adds_partner;
    if (finite == 0) return 0;
    if (p_.dim <= kPass) {  // the residuals are still in the registers
      UseResiduals(use, label, 0, is_finite, adds_partner, rows, partial_sum);
      return finite;
    }
    // Several passes: load the rows and subtract the center once more.
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Load(i, label, column, &rows);
      if (adds_partner) LoadPartner(partner, column, &rows);
#pragma unroll
      for (int e = 0; e < kLane; ++e) {
        rows.row[e] -= rows.center[e];
        rows.partner_row[e] -= rows.center[e];
      }
      UseResiduals(use, label, column, is_finite, adds_partner, rows, partial_sum);
    }
    return finite;
  }

  // Processes sample i of a class of `count` samples (two or more) and adds its residual with
  // atomicAdd to the partial sum of the class, in row `row`. The last warp to arrive moves the
  // center and clears the partial sum.
  __device__ void AddAtomically(int i, int64_t label, Rows& rows, int count, int row) {
    int finite = ProcessSample(i, -1, label, rows, Use::kAddAtomic, row);
    if (!LastWarpToArrive(p_.arrivals + row, count, &finite)) return;
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Fragment sum;
      const Fragment zeros = {};
      LoadRow<Width, Cache::kL2>(p_.PartialSum(row), column, p_.dim, sum);
      StoreRow<Width, Cache::kNormal>(p_.PartialSum(row), column, p_.dim, zeros);
      Fragment center;
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, center);
      if (finite > 0) StoreCenter(label, column, finite, sum, center);
    }
  }

  __device__ bool RowIsFinite(int i) const {
    bool finite = true;
#pragma unroll 1
    for (int64_t column = 0; column < p_.dim; column += kPass) {
      Fragment row;
      LoadRow<Width, Cache::kNormal>(p_.Features(i), column, p_.dim, row);
#pragma unroll
      for (int e = 0; e < kLane; ++e) finite = finite && IsFinite(row[e]);
    }
    return __all_sync(kAllLanes, finite);
  }

  // The factor by which a center moves along the sum of its residuals, for a class with `finite`
  // samples whose features are finite.
  __device__ Center Scale(int finite) const {
    return StepScale(p_.options.rule, Alpha(), finite, counted_);
  }

  // Stores the reduced loss. One thread of the launch calls it.
  __device__ void StoreLossSum(double sum) {
    sum *= static_cast<double>(Weight());
    if (p_.options.reduction == Reduction::kMean) {
      sum = counted_ == 0 ? 0 : sum / static_cast<double>(counted_);
    }
    *p_.loss = static_cast<Center>(sum);
  }

 private:
  __device__ static Center NotANumber() { return static_cast<Center>(FloatOf(0x7fc00000u)); }

  // Alpha and loss_weight are loaded at each use, which costs less than keeping them in registers.
  __device__ Center Alpha() const {
    return p_.cuda.alpha == nullptr ? p_.options.alpha : *p_.cuda.alpha;
  }
  __device__ Center Weight() const {
    // A kernel cannot raise an error, so a bad alpha makes the loss NaN.
    if (p_.options.update_centers && !(IsFinite(Alpha()) && Alpha() >= 0)) return NotANumber();
    return p_.cuda.loss_weight == nullptr ? p_.options.loss_weight : *p_.cuda.loss_weight;
  }
  __device__ Center SampleWeight(int i) const {
    return p_.sample_weight == nullptr ? Center{1} : p_.sample_weight[i];
  }

  // Stores `value` as scaled residual, loss and squared distance of a sample whose label is ignored
  // or out of range. Returns 0, as ProcessSample does for a sample that moves no center.
  __device__ int StoreConstant(int i, Center value) {
    if (p_.residual != nullptr) {
      Fragment row;
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

  // Replaces the features in `row` by the residual. Stores the scaled residual, the residual times
  // SampleWeight(i) * sample_scale_, which is the gradient of the loss with respect to the
  // features. Returns the sum of the squares of this lane's residuals, without these factors.
  __device__ Center StoreResidual(int i, int64_t column, const Fragment& center,
                                  Fragment& row) const {
    const Center scale = SampleWeight(i) * sample_scale_;
    Center square = 0;
    Fragment scaled;
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

  // Adds one pass of the residuals to the partial sum (kAddAtomic), or moves the center by them.
  // `adds` and `adds_partner` tell whether the features of the sample and of its partner are
  // finite; a residual whose features are not is left out. With kAddAtomic there is no partner, and
  // the features are finite.
  __device__ void UseResiduals(Use use, int64_t label, int64_t column, bool adds, bool adds_partner,
                               Rows& rows, int partial_sum) {
    if (use == Use::kAddAtomic) {
#pragma unroll
      for (int v = 0; v < kLane / Width; ++v) {
        const int64_t at = ColumnOf<Width>(column, v);
        if (at < p_.dim) AddVector<Width>(p_.PartialSum(partial_sum) + at, rows.row + v * Width);
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      if (!adds) rows.row[e] = 0;
      if (adds_partner) rows.row[e] += rows.partner_row[e];
    }
    if (p_.features_are_residuals) {  // Load has set `center` to zero
      LoadRow<Width, Cache::kNormal>(p_.CenterRow(label), column, p_.dim, rows.center);
    }
    StoreCenter(label, column, adds + adds_partner, rows.row, rows.center);
  }

  __device__ void StoreCenter(int64_t label, int64_t column, int finite, const Fragment& sum,
                              Fragment& center) {
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
