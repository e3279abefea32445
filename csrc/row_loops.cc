// The inner loops of row_loops.h on the compiler's vector types. CMakeLists.txt compiles this file
// once per instruction set and defines TCL_ISA as its name (baseline, avx2, avx512); the compiler's
// own macros (__AVX2__ and so on) then select the intrinsics.
//
// No inline function with external linkage may be emitted here: the linker keeps one copy of it for
// the whole library, possibly one that needs AVX-512. Therefore all functions are in the anonymous
// namespace, those of shared headers are force-inlined (TCL_INLINE), and <type_traits> is the only
// standard header. std::simd is C++26, and std::experimental::simd is incomplete in libc++.

#include "csrc/row_loops.h"

#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tcl {
namespace {

// Forces the inlining of a lambda; TCL_INLINE contains `inline`, which a lambda cannot have.
#define TCL_INLINED __attribute__((always_inline))

// The partial sums of a row: one AVX-512 register of float. The same for all instruction sets,
// because it determines the bits of the sums.
constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The extent of a block of lanes: all of them, or the first `count` of the last block of a row. Two
// types, so that full blocks are compiled without masks.
struct Full {};
struct Tail {
  int count;
};

// Loads and stores the lanes whose bits are set in the mask, which are the lowest ones. The other
// lanes are loaded as zeros, and their memory is not accessed.
#if defined(__AVX512F__)
TCL_INLINE __m512 MaskedLoad(unsigned mask, const float* p) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
}
TCL_INLINE __m512d MaskedLoad(unsigned mask, const double* p) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
}
TCL_INLINE void MaskedStore(unsigned mask, __m512 v, float* p) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
}
TCL_INLINE void MaskedStore(unsigned mask, __m512d v, double* p) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), v);
}
#elif defined(__AVX2__)
TCL_INLINE __m256i LaneMask(unsigned mask, const float*) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits),
                            bits);
}
TCL_INLINE __m256i LaneMask(unsigned mask, const double*) {
  const __m256i bits = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(mask), bits), bits);
}
TCL_INLINE __m256 MaskedLoad(unsigned mask, const float* p) {
  return _mm256_maskload_ps(p, LaneMask(mask, p));
}
TCL_INLINE __m256d MaskedLoad(unsigned mask, const double* p) {
  return _mm256_maskload_pd(p, LaneMask(mask, p));
}
TCL_INLINE void MaskedStore(unsigned mask, __m256 v, float* p) {
  _mm256_maskstore_ps(p, LaneMask(mask, p), v);
}
TCL_INLINE void MaskedStore(unsigned mask, __m256d v, double* p) {
  _mm256_maskstore_pd(p, LaneMask(mask, p), v);
}
#else
template <typename Center>
TCL_INLINE auto MaskedLoad(unsigned mask, const Center* p) {
  typedef Center Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(Center))));
  constexpr unsigned kWidth = kVectorBytes / sizeof(Center), kFull = (1u << kWidth) - 1;
  if ((mask & kFull) == kFull) return *reinterpret_cast<const Vector*>(p);
  Vector out = {};
  for (unsigned e = 0; mask >> e & 1; ++e) out[e] = p[e];
  return out;
}
template <typename Vector, typename Center>
TCL_INLINE void MaskedStore(unsigned mask, const Vector& v, Center* p) {
  typedef Center Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(Center))));
  constexpr unsigned kWidth = kVectorBytes / sizeof(Center), kFull = (1u << kWidth) - 1;
  if ((mask & kFull) == kFull) {
    *reinterpret_cast<Unaligned*>(p) = v;
    return;
  }
  for (unsigned e = 0; mask >> e & 1; ++e) p[e] = v[e];
}
#endif

// kLanes numbers in kVectors vector registers.
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
  static TCL_INLINE Lanes Load(const Center* p, Full) {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) {
      out.v[k] = *reinterpret_cast<const Unaligned*>(p + k * kWidth);
    }
    return out;
  }
  // The lanes after the tail are zeros.
  static TCL_INLINE Lanes Load(const Center* p, Tail tail) {
    Lanes out;
    for (int k = 0; k < kVectors; ++k) {
      out.v[k] = MaskedLoad(((1u << tail.count) - 1) >> (k * kWidth), p + k * kWidth);
    }
    return out;
  }
  TCL_INLINE void Store(Center* p, Full) const {
    for (int k = 0; k < kVectors; ++k) *reinterpret_cast<Unaligned*>(p + k * kWidth) = v[k];
  }
  TCL_INLINE void Store(Center* p, Tail tail) const {
    for (int k = 0; k < kVectors; ++k) {
      MaskedStore(((1u << tail.count) - 1) >> (k * kWidth), v[k], p + k * kWidth);
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

// Calls body(d, Full) for each full block of lanes of [0, dim) and body(d, Tail) for the rest.
template <typename Body>
TCL_INLINE void ForLanes(int64_t dim, Body body) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) body(d, Full{});
  if (d < dim) body(d, Tail{static_cast<int>(dim - d)});
}

TCL_INLINE int Count(Full) { return kLanes; }
TCL_INLINE int Count(Tail tail) { return tail.count; }

template <typename Feature, typename Extent>
TCL_INLINE Lanes<CenterType<Feature>> WidenLanes(const Feature* p, Extent extent) {
  if constexpr (std::is_same_v<Feature, CenterType<Feature>>) {
    return Lanes<Feature>::Load(p, extent);
  } else {
    float wide[kLanes] = {};
    for (int l = 0; l < Count(extent); ++l) wide[l] = Widen(p[l]);
    return Lanes<float>::Load(wide, Full{});
  }
}

template <typename Feature, typename Extent>
TCL_INLINE void RoundLanes(const Lanes<CenterType<Feature>>& lanes, Feature* p, Extent extent) {
  if constexpr (std::is_same_v<Feature, CenterType<Feature>>) {
    lanes.Store(p, extent);
  } else {
    float wide[kLanes];
    lanes.Store(wide, Full{});
    for (int l = 0; l < Count(extent); ++l) p[l] = Round<Feature>(wide[l]);
  }
}

#if defined(__F16C__)
// F16C converts eight numbers at once, with the same results as Widen and Round.
TCL_INLINE Lanes<float> WidenLanes(const Half* p, Full) {
  float wide[kLanes];
  for (int l = 0; l < kLanes; l += 8) {
    _mm256_storeu_ps(wide + l,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + l))));
  }
  return Lanes<float>::Load(wide, Full{});
}
TCL_INLINE void RoundLanes(const Lanes<float>& lanes, Half* p, Full) {
  float wide[kLanes];
  lanes.Store(wide, Full{});
  for (int l = 0; l < kLanes; l += 8) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p + l),
        _mm256_cvtps_ph(_mm256_loadu_ps(wide + l), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
#endif

// The sum of the lanes as a tree: lane[l] += lane[l + n/2] for n = kLanes, kLanes/2, ... 2. The
// instruction set must not change the tree, so it is written for vectors of 16 bytes.
template <typename Center>
TCL_INLINE Center ReduceLanes(const Lanes<Center>& lanes) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(Center));
  constexpr int kVectors = kLanes / kWidth;
  typedef Center Vector __attribute__((vector_size(16), aligned(alignof(Center))));
  Center lane[kLanes];
  lanes.Store(lane, Full{});
  Vector v[kVectors];
  for (int k = 0; k < kVectors; ++k) v[k] = *reinterpret_cast<const Vector*>(lane + k * kWidth);
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  if (kWidth == 4) return (v[0][0] + v[0][2 % kWidth]) + (v[0][1] + v[0][3 % kWidth]);
  return v[0][0] + v[0][1];
}

// Prefetches a cache line that will be written without being read. Without it, a store that misses
// requests the line only when it reaches the head of the store buffer. GCC compiles
// __builtin_prefetch(p, 1) to a prefetch for reading unless -mprfchw is given; processors without
// prefetchw execute it as a no-op.
TCL_INLINE void PrefetchForWrite(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}

// Pointers to kRows rows of the batch. If there are fewer positions, the last one is repeated.
template <typename Feature, int kRows, bool kResidual>
struct RowPointers {
  const Feature* features[kRows];
  CenterType<Feature>* residual[kRows];

  TCL_INLINE RowPointers(const RowArguments<Feature>& rows, const int64_t* positions, int count,
                         int64_t dim) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t position = positions[r < count ? r : count - 1];
      features[r] = rows.features + position * dim;
      if (kResidual) residual[r] = rows.residual + position * dim;
    }
  }
};

// Prefetches one block of lanes of a center and of rows of its class.
template <typename Feature, bool kResidual>
TCL_INLINE void PrefetchLanes(const CenterType<Feature>* centers,
                              const RowPointers<Feature, kRowsPerPass, kResidual>& rows,
                              int64_t d) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(CenterType<Feature>));
  for (int k = 0; k < kLanes; k += kLine) __builtin_prefetch(centers + d + k);
  for (int r = 0; r < kRowsPerPass; ++r) {
    __builtin_prefetch(rows.features[r] + d);
    for (int k = 0; kResidual && k < kLanes; k += kLine) {
      PrefetchForWrite(rows.residual[r] + d + k);
    }
  }
}

// Processes the kRows rows that start at index `first`.
template <typename Feature, int kRows, bool kCenters, bool kResidual, SumMode kSum>
void ResidualRows(const RowArguments<Feature>& rows, int64_t first, int64_t dim,
                  CenterType<Feature>* squares) {
  using Center = CenterType<Feature>;
  using L = Lanes<Center>;
  const int64_t* const positions = rows.positions + first;
  const RowPointers<Feature, kRows, kResidual> row(rows, positions, kRows, dim);
  Center factor[kRows];
  L square_lanes[kRows];
  for (int r = 0; r < kRows; ++r) {
    factor[r] = rows.scale;
    if (rows.sample_weight != nullptr) factor[r] = rows.sample_weight[positions[r]] * rows.scale;
    square_lanes[r] = L::Zero();
  }
  const Center* const centers = rows.centers;
  Center* const sum = rows.sum;

  // Prefetched in the same pass: the next rows of this class, or those of the later class.
  const bool is_last = first + kRows == rows.rows;
  const RowPointers<Feature, kRowsPerPass, kResidual> next(
      rows, is_last ? rows.prefetch_positions : positions + kRows,
      is_last ? rows.prefetch_rows : kRowsPerPass, dim);
  const Center* const next_centers = is_last ? rows.prefetch_centers : centers;

  ForLanes(dim, [&](int64_t d, auto extent) TCL_INLINED {
    if (kCenters) PrefetchLanes<Feature, kResidual>(next_centers, next, d);
    L center = L::Zero(), total = L::Zero();
    if (kCenters) center = L::Load(centers + d, extent);
    if (kSum == SumMode::kContinue) total = L::Load(sum + d, extent);
    for (int r = 0; r < kRows; ++r) {
      L value = WidenLanes(row.features[r] + d, extent);
      if (kCenters) value = value - center;
      square_lanes[r] = square_lanes[r] + value * value;
      if (kResidual) (value * factor[r]).Store(row.residual[r] + d, extent);
      if (kSum != SumMode::kNone) total = kSum == SumMode::kStart && r == 0 ? value : total + value;
    }
    if (kSum != SumMode::kNone) total.Store(sum + d, extent);
  });
  for (int r = 0; r < kRows; ++r) squares[first + r] = ReduceLanes(square_lanes[r]);
}

template <typename Feature, bool kCenters, bool kResidual, SumMode kSum>
void ResidualRows(const RowArguments<Feature>& rows, int64_t dim, CenterType<Feature>* squares) {
  static_assert(kRowsPerPass == 2,
                "The first pass takes one row or two, the other passes take two.");
  constexpr SumMode kRest = kSum == SumMode::kStart ? SumMode::kContinue : kSum;
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
void ResidualRows(const RowArguments<Feature>& rows, SumMode mode, int64_t dim,
                  CenterType<Feature>* squares) {
  switch (mode) {
    case SumMode::kStart:
      return ResidualRows<Feature, kCenters, kResidual, SumMode::kStart>(rows, dim, squares);
    case SumMode::kContinue:
      return ResidualRows<Feature, kCenters, kResidual, SumMode::kContinue>(rows, dim, squares);
    case SumMode::kNone:
      return ResidualRows<Feature, kCenters, kResidual, SumMode::kNone>(rows, dim, squares);
  }
}

template <typename Feature>
void Residual(const RowArguments<Feature>& rows, SumMode mode, int64_t dim,
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
void Prefetch(const RowArguments<Feature>& rows, int64_t dim) {
  if (rows.prefetch_centers == nullptr) return;
  const auto prefetch = [&](auto at) TCL_INLINED {
    ForLanes(dim,
             [&](int64_t d, auto) TCL_INLINED { PrefetchLanes(rows.prefetch_centers, at, d); });
  };
  if (rows.residual == nullptr) {
    prefetch(RowPointers<Feature, kRowsPerPass, false>(rows, rows.prefetch_positions,
                                                       rows.prefetch_rows, dim));
  } else {
    prefetch(RowPointers<Feature, kRowsPerPass, true>(rows, rows.prefetch_positions,
                                                      rows.prefetch_rows, dim));
  }
}

template <typename Center>
void Move(Center* centers, Center scale, const Center* sum, int64_t dim) {
  using L = Lanes<Center>;
  ForLanes(dim, [=](int64_t d, auto extent) TCL_INLINED {
    (L::Load(centers + d, extent) + L::Load(sum + d, extent) * scale).Store(centers + d, extent);
  });
}

template <typename Center>
void Add(Center* sum, const Center* other, int64_t dim) {
  using L = Lanes<Center>;
  ForLanes(dim, [=](int64_t d, auto extent) TCL_INLINED {
    (L::Load(sum + d, extent) + L::Load(other + d, extent)).Store(sum + d, extent);
  });
}

template <typename Feature>
void Scale(const CenterType<Feature>* residual, CenterType<Feature> factor, Feature* out,
           int64_t dim) {
  using L = Lanes<CenterType<Feature>>;
  ForLanes(dim, [=](int64_t d, auto extent) TCL_INLINED {
    RoundLanes(L::Load(residual + d, extent) * factor, out + d, extent);
  });
}

// IsFinite instead of std::isfinite, which is an inline function of a shared header.
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
  static constexpr RowLoops<Feature> loops = {Residual<Feature>, Prefetch<Feature>,
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
