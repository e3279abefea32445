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

// Of lambdas, which have no place for `inline`.
#define TCL_INLINED __attribute__((always_inline))

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// How many of the lanes a row fills: all, or at its end the first `count`.
struct All {};
struct First {
  int count;
};

// A vector's numbers at the bits of the mask, which are the lowest ones; elsewhere zeros, and
// nothing is read or written.
#if defined(__AVX512F__)
TCL_INLINE __m512 LoadWhere(unsigned mask, const float* p) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
}
TCL_INLINE __m512d LoadWhere(unsigned mask, const double* p) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
}
TCL_INLINE void StoreWhere(unsigned mask, __m512 v, float* p) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
}
TCL_INLINE void StoreWhere(unsigned mask, __m512d v, double* p) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), v);
}
#elif defined(__AVX2__)
TCL_INLINE __m256i Where(unsigned mask, const float*) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits),
                            bits);
}
TCL_INLINE __m256i Where(unsigned mask, const double*) {
  const __m256i bits = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(mask), bits), bits);
}
TCL_INLINE __m256 LoadWhere(unsigned mask, const float* p) {
  return _mm256_maskload_ps(p, Where(mask, p));
}
TCL_INLINE __m256d LoadWhere(unsigned mask, const double* p) {
  return _mm256_maskload_pd(p, Where(mask, p));
}
TCL_INLINE void StoreWhere(unsigned mask, __m256 v, float* p) {
  _mm256_maskstore_ps(p, Where(mask, p), v);
}
TCL_INLINE void StoreWhere(unsigned mask, __m256d v, double* p) {
  _mm256_maskstore_pd(p, Where(mask, p), v);
}
#else
template <typename Center>
TCL_INLINE auto LoadWhere(unsigned mask, const Center* p) {
  typedef Center Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(Center))));
  constexpr unsigned kWidth = kVectorBytes / sizeof(Center), kFull = (1u << kWidth) - 1;
  if ((mask & kFull) == kFull) return *reinterpret_cast<const Vector*>(p);
  Vector out = {};
  for (unsigned e = 0; mask >> e & 1; ++e) out[e] = p[e];
  return out;
}
template <typename Vector, typename Center>
TCL_INLINE void StoreWhere(unsigned mask, const Vector& v, Center* p) {
  typedef Center Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(Center))));
  constexpr unsigned kWidth = kVectorBytes / sizeof(Center), kFull = (1u << kWidth) - 1;
  if ((mask & kFull) == kFull) {
    *reinterpret_cast<Unaligned*>(p) = v;
    return;
  }
  for (unsigned e = 0; mask >> e & 1; ++e) p[e] = v[e];
}
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
  static TCL_INLINE Lanes Load(const Center* p, All) {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) {
      out.v[k] = *reinterpret_cast<const Unaligned*>(p + k * kWidth);
    }
    return out;
  }
  // Zeros behind the first.
  static TCL_INLINE Lanes Load(const Center* p, First first) {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) {
      out.v[k] = LoadWhere(((1u << first.count) - 1) >> (k * kWidth), p + k * kWidth);
    }
    return out;
  }
  TCL_INLINE void Store(Center* p, All) const {
    for (int k = 0; k < kVectors; ++k) *reinterpret_cast<Unaligned*>(p + k * kWidth) = v[k];
  }
  TCL_INLINE void Store(Center* p, First first) const {
    for (int k = 0; k < kVectors; ++k) {
      StoreWhere(((1u << first.count) - 1) >> (k * kWidth), v[k], p + k * kWidth);
    }
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

// Calls body(d, All or First) for every kLanes of [0, dim) and what is left.
template <typename Body>
TCL_INLINE void ForLanes(int64_t dim, Body body) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) body(d, All{});
  if (d < dim) body(d, First{static_cast<int>(dim - d)});
}

TCL_INLINE int Count(All) { return kLanes; }
TCL_INLINE int Count(First first) { return first.count; }

template <typename Feature, typename Part>
TCL_INLINE Lanes<CenterType<Feature>> WidenLanes(const Feature* p, Part part) {
  if constexpr (std::is_same_v<Feature, CenterType<Feature>>) {
    return Lanes<Feature>::Load(p, part);
  } else {
    float wide[kLanes] = {};
    for (int l = 0; l < Count(part); ++l) wide[l] = Widen(p[l]);
    return Lanes<float>::Load(wide, All{});
  }
}

template <typename Feature, typename Part>
TCL_INLINE void RoundLanes(const Lanes<CenterType<Feature>>& lanes, Feature* p, Part part) {
  if constexpr (std::is_same_v<Feature, CenterType<Feature>>) {
    lanes.Store(p, part);
  } else {
    float wide[kLanes];
    lanes.Store(wide, All{});
    for (int l = 0; l < Count(part); ++l) p[l] = Round<Feature>(wide[l]);
  }
}

#if defined(__F16C__)
// F16C converts as Widen and Round do, eight numbers at a time.
TCL_INLINE Lanes<float> WidenLanes(const Half* p, All) {
  float wide[kLanes];
  for (int l = 0; l < kLanes; l += 8) {
    _mm256_storeu_ps(wide + l,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + l))));
  }
  return Lanes<float>::Load(wide, All{});
}
TCL_INLINE void RoundLanes(const Lanes<float>& lanes, Half* p, All) {
  float wide[kLanes];
  lanes.Store(wide, All{});
  for (int l = 0; l < kLanes; l += 8) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p + l),
        _mm256_cvtps_ph(_mm256_loadu_ps(wide + l), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
#endif

// The sum of the lanes: lane[l] + lane[l + n/2] for n = kLanes, kLanes/2, ... 2, the same tree
// everywhere.
template <typename Center>
TCL_INLINE Center Fold(const Lanes<Center>& lanes) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(Center));
  constexpr int kVectors = kLanes / kWidth;
  typedef Center Vector __attribute__((vector_size(16), aligned(alignof(Center))));
  Center lane[kLanes];
  lanes.Store(lane, All{});
  Vector v[kVectors];
  for (int k = 0; k < kVectors; ++k) v[k] = *reinterpret_cast<const Vector*>(lane + k * kWidth);
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  if (kWidth == 4) return (v[0][0] + v[0][2 % kWidth]) + (v[0][1] + v[0][3 % kWidth]);
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

// The rows at some positions of the batch; of fewer than kRows the last one again.
template <typename Feature, int kRows, bool kResidual>
struct RowsAt {
  const Feature* features[kRows];
  CenterType<Feature>* residual[kRows];

  TCL_INLINE RowsAt(const RowArguments<Feature>& rows, const int64_t* positions, int count,
                    int64_t dim) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t position = positions[r < count ? r : count - 1];
      features[r] = rows.features + position * dim;
      if (kResidual) residual[r] = rows.residual + position * dim;
    }
  }
};

// A class's centers and some rows of it, in part, for a loop that comes later.
template <typename Feature, bool kResidual>
TCL_INLINE void FetchLanes(const CenterType<Feature>* centers,
                           const RowsAt<Feature, kRowsTogether, kResidual>& rows, int64_t d) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(CenterType<Feature>));
  for (int k = 0; k < kLanes; k += kLine) __builtin_prefetch(centers + d + k);
  for (int r = 0; r < kRowsTogether; ++r) {
    __builtin_prefetch(rows.features[r] + d);
    for (int k = 0; kResidual && k < kLanes; k += kLine) {
      FetchForWriting(rows.residual[r] + d + k);
    }
  }
}

// The rows that begin with the number `first` of these.
template <typename Feature, int kRows, bool kCenters, bool kResidual, Sum kSum>
void ResidualRows(const RowArguments<Feature>& rows, int64_t first, int64_t dim,
                  CenterType<Feature>* squares) {
  using Center = CenterType<Feature>;
  using L = Lanes<Center>;
  const int64_t* const positions = rows.positions + first;
  const RowsAt<Feature, kRows, kResidual> row(rows, positions, kRows, dim);
  Center factor[kRows];
  L square_lanes[kRows];
  for (int r = 0; r < kRows; ++r) {
    factor[r] = rows.scale;
    if (rows.sample_weight != nullptr) factor[r] = rows.sample_weight[positions[r]] * rows.scale;
    square_lanes[r] = L::Zero();
  }
  const Center* const centers = rows.centers;
  Center* const sum = rows.sum;

  // To be fetched meanwhile: the rows that are next, at the end later ones.
  const bool ends = first + kRows == rows.rows;
  const RowsAt<Feature, kRowsTogether, kResidual> next(
      rows, ends ? rows.later_positions : positions + kRows, ends ? rows.later_rows : kRowsTogether,
      dim);
  const Center* const next_centers = ends ? rows.later_centers : centers;

  ForLanes(dim, [&](int64_t d, auto part) TCL_INLINED {
    if (kCenters) FetchLanes<Feature, kResidual>(next_centers, next, d);
    L center = L::Zero(), total = L::Zero();
    if (kCenters) center = L::Load(centers + d, part);
    if (kSum == Sum::kAdd) total = L::Load(sum + d, part);
    for (int r = 0; r < kRows; ++r) {
      L value = WidenLanes(row.features[r] + d, part);
      if (kCenters) value = value - center;
      square_lanes[r] = square_lanes[r] + value * value;
      if (kResidual) (value * factor[r]).Store(row.residual[r] + d, part);
      if (kSum != Sum::kNone) total = kSum == Sum::kStart && r == 0 ? value : total + value;
    }
    if (kSum != Sum::kNone) total.Store(sum + d, part);
  });
  for (int r = 0; r < kRows; ++r) squares[first + r] = Fold(square_lanes[r]);
}

template <typename Feature, bool kCenters, bool kResidual, Sum kSum>
void ResidualRows(const RowArguments<Feature>& rows, int64_t dim, CenterType<Feature>* squares) {
  static_assert(kRowsTogether == 2, "an odd one, then pairs");
  constexpr Sum kRest = kSum == Sum::kStart ? Sum::kAdd : kSum;
  int64_t first = 1 + (rows.rows - 1) % 2;
  if (first == 1) {
    ResidualRows<Feature, 1, kCenters, kResidual, kSum>(rows, 0, dim, squares);
  } else {
    ResidualRows<Feature, 2, kCenters, kResidual, kSum>(rows, 0, dim, squares);
  }
  for (; first < rows.rows; first += 2) {
    ResidualRows<Feature, 2, kCenters, kResidual, kRest>(rows, first, dim, squares);
  }
}

template <typename Feature, bool kCenters, bool kResidual>
void ResidualRows(const RowArguments<Feature>& rows, Sum mode, int64_t dim,
                  CenterType<Feature>* squares) {
  switch (mode) {
    case Sum::kStart:
      return ResidualRows<Feature, kCenters, kResidual, Sum::kStart>(rows, dim, squares);
    case Sum::kAdd:
      return ResidualRows<Feature, kCenters, kResidual, Sum::kAdd>(rows, dim, squares);
    case Sum::kNone:
      return ResidualRows<Feature, kCenters, kResidual, Sum::kNone>(rows, dim, squares);
  }
}

template <typename Feature>
void Residual(const RowArguments<Feature>& rows, Sum mode, int64_t dim,
              CenterType<Feature>* squares) {
  if (rows.centers == nullptr) {
    return ResidualRows<Feature, false, false>(rows, mode, dim, squares);
  }
  if (rows.residual == nullptr) {
    return ResidualRows<Feature, true, false>(rows, mode, dim, squares);
  }
  return ResidualRows<Feature, true, true>(rows, mode, dim, squares);
}

template <typename Feature>
void Fetch(const RowArguments<Feature>& rows, int64_t dim) {
  if (rows.later_centers == nullptr) return;
  const auto fetch = [&](auto at) TCL_INLINED {
    ForLanes(dim, [&](int64_t d, auto) TCL_INLINED { FetchLanes(rows.later_centers, at, d); });
  };
  if (rows.residual == nullptr) {
    fetch(RowsAt<Feature, kRowsTogether, false>(rows, rows.later_positions, rows.later_rows, dim));
  } else {
    fetch(RowsAt<Feature, kRowsTogether, true>(rows, rows.later_positions, rows.later_rows, dim));
  }
}

template <typename Center>
void Move(Center* centers, Center scale, const Center* sum, int64_t dim) {
  using L = Lanes<Center>;
  ForLanes(dim, [=](int64_t d, auto part) TCL_INLINED {
    (L::Load(centers + d, part) + L::Load(sum + d, part) * scale).Store(centers + d, part);
  });
}

template <typename Center>
void Add(Center* sum, const Center* other, int64_t dim) {
  using L = Lanes<Center>;
  ForLanes(dim, [=](int64_t d, auto part) TCL_INLINED {
    (L::Load(sum + d, part) + L::Load(other + d, part)).Store(sum + d, part);
  });
}

template <typename Feature>
void Scale(const CenterType<Feature>* residual, CenterType<Feature> factor, Feature* out,
           int64_t dim) {
  using L = Lanes<CenterType<Feature>>;
  ForLanes(dim, [=](int64_t d, auto part) TCL_INLINED {
    RoundLanes(L::Load(residual + d, part) * factor, out + d, part);
  });
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
  static constexpr RowLoops<Feature> loops = {Residual<Feature>, Fetch<Feature>,
                                              Move<Center>,      Add<Center>,
                                              Scale<Feature>,    AllFinite<Feature>};
  return loops;
}

template const RowLoops<float>& Loops();
template const RowLoops<double>& Loops();
template const RowLoops<Half>& Loops();
template const RowLoops<BFloat16>& Loops();

}  // namespace TCL_ISA
}  // namespace tcl
