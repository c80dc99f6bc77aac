// Loads and stores of channel vectors: narrowing to 16 bits, and vectors of which only the first lanes exist. For
// *_simd.cpp files only.
#pragma once

#include "vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {

inline void store_as(float* to, const FloatVector& v) { store(to, v); }
inline void store_as(double* to, const DoubleVector& v) { store(to, v); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store_as(BFloat16* to, const FloatVector& v) {
  const auto bits = bits_as<UnsignedVector>(v);
  const UnsignedVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UnsignedVector nan = UnsignedVector{} + 0x7fc0u;
  store(to, __builtin_convertvector(v == v ? rounded : nan, HalfBitsVector));
}

// The cases of from_compute(float, Float16*) in vector.h, all computed. Signed comparisons: the sign bit is off.
inline void store_as(Float16* to, const FloatVector& v) {
  const auto all = bits_as<UnsignedVector>(v);
  const UnsignedVector bits = all & 0x7fffffffu;
  const auto size = bits_as<IntVector>(bits);
  UnsignedVector half = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const UnsignedVector subnormal = bits_as<UnsignedVector>(bits_as<FloatVector>(bits) + 0.5f) - 0x3f000000u;
  half = size < 0x38800000 ? subnormal : half;
  half = size >= 0x477ff000 ? UnsignedVector{} + 0x7c00u : half;
  half = size > 0x7f800000 ? UnsignedVector{} + 0x7e00u : half;
  store(to, __builtin_convertvector(half | ((all >> 16) & 0x8000u), HalfBitsVector));
}

// The first `count` lanes; the others are 0.
template <class T>
inline typename Compute<T>::Vector load_first(const T* from, int64_t count) {
  constexpr int lanes = Compute<T>::lanes;
  if (count >= lanes) return load(from);
  T padded[lanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T>
inline void store_first(T* to, const typename Compute<T>::Vector& v, int64_t count) {
  constexpr int lanes = Compute<T>::lanes;
  if (count >= lanes) return store_as(to, v);
  T padded[lanes];
  store_as(padded, v);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
