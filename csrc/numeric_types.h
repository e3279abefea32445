// The element types of features, for the CPU kernel and the CUDA kernel: IEEE float32 and float64,
// and the two 16-bit formats as their bits. A conversion from 16 bits is exact; a conversion to 16
// bits rounds once, to nearest, ties to even.
//
// Eigen::half and Eigen::bfloat16 do the same, but kernels include no framework. _Float16 of the
// compiler calls a function of libgcc for each conversion on processors without F16C.

#ifndef TF_CENTER_LOSS_OP_CSRC_NUMERIC_TYPES_H_
#define TF_CENTER_LOSS_OP_CSRC_NUMERIC_TYPES_H_

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

// Inlining is forced for correctness: row_loops.cc is compiled once per instruction set, and of a
// function that is not inlined the linker keeps one copy for all of them.
#if defined(__CUDACC__)
#define TCL_INLINE __host__ __device__ __forceinline__
#else
#define TCL_INLINE inline __attribute__((always_inline))
#endif

namespace tcl {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The centers' type for a type of features: float64 for float64, float32 for the others.
template <typename Feature>
struct CenterTypeOf {
  using type = float;
};
template <>
struct CenterTypeOf<double> {
  using type = double;
};
template <typename Feature>
using CenterType = typename CenterTypeOf<Feature>::type;

// std::bit_cast is C++20.
TCL_INLINE uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

TCL_INLINE float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

TCL_INLINE float Widen(float value) { return value; }
TCL_INLINE double Widen(double value) { return value; }
TCL_INLINE float Widen(BFloat16 value) { return FloatOf(static_cast<uint32_t>(value.bits) << 16); }
TCL_INLINE float Widen(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return FloatOf(sign | 0x7f800000u | (magnitude << 13));  // inf, NaN
  if (magnitude >= 0x0400u) return FloatOf(sign | ((magnitude << 13) + 0x38000000u));
  // A subnormal half is a normal float. TensorFlow's threads flush subnormal floats to zero, so no
  // intermediate result may be one.
  return FloatOf(sign | BitsOf(static_cast<float>(magnitude) * 0x1p-24f));
#endif
}

template <typename Feature>
TCL_INLINE Feature Round(CenterType<Feature> value) {
  return value;
}
template <>
TCL_INLINE BFloat16 Round<BFloat16>(float value) {
  const uint32_t bits = BitsOf(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN, which rounding could turn into an infinity
    return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
TCL_INLINE Half Round<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t sign = (BitsOf(value) >> 16) & 0x8000u;
  const uint32_t magnitude = BitsOf(value) & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u | ((magnitude >> 13) & 0x03ffu);  // NaN
  } else if (magnitude >= 0x477ff000u) {
    rounded = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal. Adding 0.5 shifts its 10 bits to the end of the
    // significand, and the addition rounds them.
    rounded = BitsOf(FloatOf(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
#endif
}

TCL_INLINE bool IsFinite(float value) { return (BitsOf(value) & 0x7f800000u) != 0x7f800000u; }
TCL_INLINE bool IsFinite(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}
TCL_INLINE bool IsFinite(Half value) { return (value.bits & 0x7c00u) != 0x7c00u; }
TCL_INLINE bool IsFinite(BFloat16 value) { return (value.bits & 0x7f80u) != 0x7f80u; }

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_NUMERIC_TYPES_H_
