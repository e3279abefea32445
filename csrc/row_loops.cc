// Compiled once per instruction set; TCL_ISA names it (baseline, avx2 or avx512). Nothing here may
// leave an inline function of a shared header out of line: the linker would keep one copy for all
// instruction sets. Hence the anonymous namespace, and no standard library but its traits.

#include "csrc/row_loops.h"

#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tcl {
namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// kLanes numbers in as many vector registers as they take.
template <typename Center>
struct Lanes {
  typedef Center Vector __attribute__((vector_size(kVectorBytes)));
  typedef Center Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(Center))));
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Center));
  static constexpr int kVectors = kLanes / kWidth;

  Vector v[kVectors];

  static TCL_INLINE Lanes Zero() {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) out.v[k] = Vector{};
    return out;
  }
  static TCL_INLINE Lanes Load(const Center* p) {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) {
      out.v[k] = *reinterpret_cast<const Unaligned*>(p + k * kWidth);
    }
    return out;
  }
  TCL_INLINE void Store(Center* p) const {
    for (int k = 0; k < kVectors; ++k) *reinterpret_cast<Unaligned*>(p + k * kWidth) = v[k];
  }
  TCL_INLINE Lanes operator+(const Lanes& other) const {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) out.v[k] = v[k] + other.v[k];
    return out;
  }
  TCL_INLINE Lanes operator-(const Lanes& other) const {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) out.v[k] = v[k] - other.v[k];
    return out;
  }
  TCL_INLINE Lanes operator*(const Lanes& other) const {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) out.v[k] = v[k] * other.v[k];
    return out;
  }
  TCL_INLINE Lanes operator*(Center factor) const {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) out.v[k] = v[k] * factor;
    return out;
  }
};

TCL_INLINE Lanes<float> WidenLanes(const float* p) { return Lanes<float>::Load(p); }
TCL_INLINE Lanes<double> WidenLanes(const double* p) { return Lanes<double>::Load(p); }
template <typename Feature>
TCL_INLINE Lanes<float> WidenLanes(const Feature* p) {
  float wide[kLanes];
  for (int l = 0; l < kLanes; ++l) wide[l] = Widen(p[l]);
  return Lanes<float>::Load(wide);
}

TCL_INLINE void RoundLanes(const Lanes<float>& lanes, float* p) { lanes.Store(p); }
TCL_INLINE void RoundLanes(const Lanes<double>& lanes, double* p) { lanes.Store(p); }
template <typename Feature>
TCL_INLINE void RoundLanes(const Lanes<float>& lanes, Feature* p) {
  float wide[kLanes];
  lanes.Store(wide);
  for (int l = 0; l < kLanes; ++l) p[l] = Round<Feature>(wide[l]);
}

#if defined(__F16C__)
// F16C converts as Widen and Round do, eight numbers at a time.
template <>
TCL_INLINE Lanes<float> WidenLanes<Half>(const Half* p) {
  float wide[kLanes];
  for (int l = 0; l < kLanes; l += 8) {
    _mm256_storeu_ps(wide + l,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + l))));
  }
  return Lanes<float>::Load(wide);
}
template <>
TCL_INLINE void RoundLanes<Half>(const Lanes<float>& lanes, Half* p) {
  float wide[kLanes];
  lanes.Store(wide);
  for (int l = 0; l < kLanes; l += 8) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p + l),
        _mm256_cvtps_ph(_mm256_loadu_ps(wide + l), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
#endif

// Rows end in whole vectors of 16 bytes where they can, on every instruction set.
template <typename Center>
struct Tail {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(Center));
  typedef Center Vector __attribute__((vector_size(16), aligned(alignof(Center))));
};

// lane[l] + lane[l + n/2] for n = kLanes, kLanes/2, ... 2: the same tree everywhere.
template <typename Center>
TCL_INLINE Center Fold(const Center* lane) {
  using T = Tail<Center>;
  constexpr int kVectors = kLanes / T::kWidth;
  typename T::Vector v[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    v[k] = *reinterpret_cast<const typename T::Vector*>(lane + k * T::kWidth);
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  if (T::kWidth == 4) return (v[0][0] + v[0][2 % T::kWidth]) + (v[0][1] + v[0][3 % T::kWidth]);
  return v[0][0] + v[0][1];
}

// The cache line of a row that is written without being read: for a store that misses, the line is
// asked for only when the store's turn comes. (__builtin_prefetch(p, 1) would be a prefetch for
// reading on x86-64 in general; a processor too old for prefetchw takes it for a no-op.)
TCL_INLINE void FetchForWriting(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}

template <typename Feature, bool kResidual>
TCL_INLINE void Fetch(const RowArguments<Feature>& next, int64_t d) {
  using Center = CenterType<Feature>;
  constexpr int kLine = 64 / static_cast<int>(sizeof(Center));
  for (int k = 0; k < kLanes; k += kLine) __builtin_prefetch(next.centers + d + k);
  for (int r = 0; r < next.rows; ++r) {
    __builtin_prefetch(next.features[r] + d);
    for (int k = 0; kResidual && k < kLanes; k += kLine) FetchForWriting(next.residual[r] + d + k);
  }
}

template <typename Feature, int kRows, bool kCenters, bool kResidual, Sum kSum, bool kFetch>
void ResidualRows(const RowArguments<Feature>& rows, int64_t dim, CenterType<Feature>* squares) {
  using Center = CenterType<Feature>;
  using L = Lanes<Center>;
  using T = Tail<Center>;
  using V = typename T::Vector;
  const Feature* features[kRows];
  Center* residual[kRows];
  Center factor[kRows];
  L square_lanes[kRows];
  for (int r = 0; r < kRows; ++r) {
    features[r] = rows.features[r];
    residual[r] = rows.residual[r];
    factor[r] = rows.factor[r];
    square_lanes[r] = L::Zero();
  }
  const Center* const centers = rows.centers;
  Center* const sum = rows.sum;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    if (kFetch) Fetch<Feature, kResidual>(*rows.next, d);
    L center = L::Zero(), total = L::Zero();
    if (kCenters) center = L::Load(centers + d);
    if (kSum == Sum::kAdd) total = L::Load(sum + d);
    for (int r = 0; r < kRows; ++r) {
      L value = WidenLanes(features[r] + d);
      if (kCenters) value = value - center;
      square_lanes[r] = square_lanes[r] + value * value;
      if (kResidual) (value * factor[r]).Store(residual[r] + d);
      if (kSum != Sum::kNone) total = kSum == Sum::kStart && r == 0 ? value : total + value;
    }
    if (kSum != Sum::kNone) total.Store(sum + d);
  }
  Center lane[kRows][kLanes];
  for (int r = 0; r < kRows; ++r) square_lanes[r].Store(lane[r]);
  int l = 0;
  if (std::is_same<Feature, Center>::value) {
    for (; d + T::kWidth <= dim; d += T::kWidth, l += T::kWidth) {
      V center = {}, total = {};
      if (kCenters) center = *reinterpret_cast<const V*>(centers + d);
      if (kSum == Sum::kAdd) total = *reinterpret_cast<const V*>(sum + d);
      for (int r = 0; r < kRows; ++r) {
        V value = *reinterpret_cast<const V*>(features[r] + d);
        if (kCenters) value -= center;
        *reinterpret_cast<V*>(lane[r] + l) += value * value;
        if (kResidual) *reinterpret_cast<V*>(residual[r] + d) = value * factor[r];
        if (kSum != Sum::kNone) total = kSum == Sum::kStart && r == 0 ? value : total + value;
      }
      if (kSum != Sum::kNone) *reinterpret_cast<V*>(sum + d) = total;
    }
  }
  for (; d < dim; ++d, ++l) {
    for (int r = 0; r < kRows; ++r) {
      Center value = Widen(features[r][d]);
      if (kCenters) value -= centers[d];
      lane[r][l] += value * value;
      if (kResidual) residual[r][d] = value * factor[r];
      if (kSum != Sum::kNone) sum[d] = kSum == Sum::kStart && r == 0 ? value : sum[d] + value;
    }
  }
  for (int r = 0; r < kRows; ++r) squares[r] = Fold(lane[r]);
}

template <typename Feature, int kRows, bool kCenters, bool kResidual, Sum kSum>
void ResidualRows(const RowArguments<Feature>& rows, int64_t dim, CenterType<Feature>* squares) {
  if (kCenters && rows.next != nullptr) {
    return ResidualRows<Feature, kRows, kCenters, kResidual, kSum, kCenters>(rows, dim, squares);
  }
  return ResidualRows<Feature, kRows, kCenters, kResidual, kSum, false>(rows, dim, squares);
}

template <typename Feature, int kRows, bool kCenters, bool kResidual>
void ResidualRows(const RowArguments<Feature>& rows, Sum mode, int64_t dim,
                  CenterType<Feature>* squares) {
  switch (mode) {
    case Sum::kStart:
      return ResidualRows<Feature, kRows, kCenters, kResidual, Sum::kStart>(rows, dim, squares);
    case Sum::kAdd:
      return ResidualRows<Feature, kRows, kCenters, kResidual, Sum::kAdd>(rows, dim, squares);
    case Sum::kNone:
      return ResidualRows<Feature, kRows, kCenters, kResidual, Sum::kNone>(rows, dim, squares);
  }
}

template <typename Feature, int kRows>
void ResidualRows(const RowArguments<Feature>& rows, Sum mode, int64_t dim,
                  CenterType<Feature>* squares) {
  if (rows.centers == nullptr) {
    return ResidualRows<Feature, kRows, false, false>(rows, mode, dim, squares);
  }
  if (rows.residual[0] == nullptr) {
    return ResidualRows<Feature, kRows, true, false>(rows, mode, dim, squares);
  }
  return ResidualRows<Feature, kRows, true, true>(rows, mode, dim, squares);
}

template <typename Feature>
void Residual(const RowArguments<Feature>& rows, Sum mode, int64_t dim,
              CenterType<Feature>* squares) {
  static_assert(kMaxRows == 2, "one case for each number of rows");
  return rows.rows == 1 ? ResidualRows<Feature, 1>(rows, mode, dim, squares)
                        : ResidualRows<Feature, 2>(rows, mode, dim, squares);
}

template <typename Center>
void Move(Center* centers, Center scale, const Center* sum, int64_t dim) {
  using L = Lanes<Center>;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    (L::Load(centers + d) + L::Load(sum + d) * scale).Store(centers + d);
  }
  for (; d < dim; ++d) centers[d] += sum[d] * scale;
}

template <typename Center>
void Add(Center* sum, const Center* other, int64_t dim) {
  using L = Lanes<Center>;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    (L::Load(sum + d) + L::Load(other + d)).Store(sum + d);
  }
  for (; d < dim; ++d) sum[d] += other[d];
}

template <typename Feature>
void Scale(const CenterType<Feature>* residual, CenterType<Feature> factor, Feature* out,
           int64_t dim) {
  using L = Lanes<CenterType<Feature>>;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) RoundLanes(L::Load(residual + d) * factor, out + d);
  for (; d < dim; ++d) out[d] = Round<Feature>(residual[d] * factor);
}

template <typename Feature>
bool AllFinite(const Feature* features, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (!IsFinite(features[d])) return false;
  }
  return true;
}

}  // namespace

namespace TCL_ISA {

template <typename Feature>
const RowLoops<Feature>& Loops() {
  using Center = CenterType<Feature>;
  static constexpr RowLoops<Feature> loops = {Residual<Feature>, Move<Center>, Add<Center>,
                                              Scale<Feature>, AllFinite<Feature>};
  return loops;
}

template const RowLoops<float>& Loops();
template const RowLoops<double>& Loops();
template const RowLoops<Half>& Loops();
template const RowLoops<BFloat16>& Loops();

}  // namespace TCL_ISA
}  // namespace tcl
