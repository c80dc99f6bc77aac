// Vectors of the instruction set that the including file is compiled for, by the compiler's own vector types: no
// intrinsics, so x86-64 and arm64 take the same path. Included by *_simd.cpp files only (see isa.h).
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

#if defined(__AVX512F__)
#define BIASLOSS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BIASLOSS_VECTOR_BYTES 32
#else
#define BIASLOSS_VECTOR_BYTES 16
#endif

namespace biasloss {

namespace BIASLOSS_ISA {

constexpr int kFloatLanes = BIASLOSS_VECTOR_BYTES / 4;
constexpr int kDoubleLanes = BIASLOSS_VECTOR_BYTES / 8;

typedef float FloatVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES)));
typedef int64_t LongVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES)));
typedef uint32_t UnsignedVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES / 2)));

// The vector in which values of type T are computed.
template <class T>
struct Compute {
  using Scalar = float;
  using Vector = FloatVector;
  static constexpr int lanes = kFloatLanes;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vector = DoubleVector;
  static constexpr int lanes = kDoubleLanes;
};

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
inline V load_bytes(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

inline FloatVector load(const float* from) { return load_bytes<FloatVector>(from); }
inline DoubleVector load(const double* from) { return load_bytes<DoubleVector>(from); }

inline FloatVector load(const BFloat16* from) {
  const auto wide = __builtin_convertvector(load_bytes<HalfBitsVector>(from), UnsignedVector) << 16;
  return bits_as<FloatVector>(wide);
}

// Exact, subnormal values included: the exponent is rebased by adding an integer; the few values that this gets wrong
// are mended by a subtraction that normalizes (subnormal) and by a second rebase (infinite, NaN).
inline FloatVector load(const Float16* from) {
  const auto half = __builtin_convertvector(load_bytes<HalfBitsVector>(from), UnsignedVector);
  const UnsignedVector exponent_and_mantissa = (half & 0x7fffu) << 13;
  const UnsignedVector exponent = exponent_and_mantissa & 0x0f800000u;
  UnsignedVector bits = exponent_and_mantissa + (112u << 23);
  bits = exponent == 0x0f800000u ? bits + (112u << 23) : bits;
  const UnsignedVector smallest_normal = bits + (1u << 23);
  const FloatVector normalized = bits_as<FloatVector>(smallest_normal) - 0x1p-14f;
  bits = exponent == 0u ? bits_as<UnsignedVector>(normalized) : bits;
  bits |= (half & 0x8000u) << 16;
  return bits_as<FloatVector>(bits);
}

template <class V, class T>
inline void store(T* to, const V& v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// Which of the last `lanes` values of a row lie behind its last whole vector: the last vector overlaps the one before
// it, and costs neither scalar arithmetic nor a copy.
template <class V, class Index>
inline auto last_lanes(int64_t count) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  Index number;
  for (int i = 0; i < lanes; ++i) number[i] = i;
  return number >= static_cast<decltype(number[0] + 0)>(lanes - count);
}
inline FloatVector keep_last(const FloatVector& v, int64_t count, float fill) {
  return last_lanes<FloatVector, IntVector>(count) ? v : FloatVector{} + fill;
}
inline DoubleVector keep_last(const DoubleVector& v, int64_t count, double fill) {
  return last_lanes<DoubleVector, LongVector>(count) ? v : DoubleVector{} + fill;
}

// Scalar conversions, for heads, tails and strided access.
inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float to_compute(Float16 x) {
  Float16 padded[kFloatLanes] = {x};
  return load(padded)[0];
}

inline void from_compute(float x, float* to) { *to = x; }
inline void from_compute(double x, double* to) { *to = x; }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void from_compute(float x, BFloat16* to) {
  const auto bits = bits_as<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_compute(float x, Float16* to) {
  auto bits = bits_as<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to infinity
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: the addition rounds at the right place
    half = bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000u;
  } else {
    half = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  to->bits = uint16_t(sign | half);
}

// The lanes, merged by halves.
template <class V, class Merge>
inline auto merge_lanes(const V& v, const Merge& merge) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  typename Compute<__typeof__(v[0] + 0)>::Scalar parts[lanes];
  store(parts, v);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] = merge(parts[i], parts[i + width]);
  return parts[0];
}

template <class V>
inline auto horizontal_sum(const V& v) {
  return merge_lanes(v, [](auto a, auto b) { return a + b; });
}

template <class V>
inline V maximum(const V& a, const V& b) {
  return a > b ? a : b;
}

template <class V>
inline auto horizontal_maximum(const V& v) {
  return merge_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// exp by range reduction to [-ln2/2, ln2/2] and a polynomial, within 1 ulp; results down to the smallest subnormal; NaN
// stays. Scaling by 2^n takes two steps, so that n may leave the range of one exponent field.
inline FloatVector exponential(FloatVector x) {
  const FloatVector lowest = FloatVector{} - 104.0f;
  const FloatVector highest = FloatVector{} + 89.0f;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const float round = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  const FloatVector shifted = x * 0x1.715476p0f + round;
  const FloatVector n = shifted - round;
  const FloatVector r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  FloatVector p = FloatVector{} + 0x1.6a23d0p-10f;
  p = p * r + 0x1.123a20p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = (p * r) * r + r + 1.0f;
  const IntVector exponent = bits_as<IntVector>(shifted) - 0x4b400000;
  const IntVector half = exponent >> 1;
  const IntVector first = (half + 127) << 23;
  const IntVector second = (exponent - half + 127) << 23;
  return p * bits_as<FloatVector>(first) * bits_as<FloatVector>(second);
}

// float64 is there for exactness, not for speed.
inline DoubleVector exponential(DoubleVector x) {
  for (int i = 0; i < kDoubleLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
