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

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Lanes of which `mask` has a bit, read and written as one vector: the others are 0, and stay as they are in memory. By
// the names that gcc and clang give the instructions; their header takes half a second to compile.
typedef short ShortVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES / 2)));

inline FloatVector load_lanes(const float* from, uint32_t mask) {
  return __builtin_ia32_loadups512_mask(from, FloatVector{}, static_cast<uint16_t>(mask));
}
inline DoubleVector load_lanes(const double* from, uint32_t mask) {
  return __builtin_ia32_loadupd512_mask(from, DoubleVector{}, static_cast<uint8_t>(mask));
}
template <class T>
inline FloatVector load_lanes(const T* from, uint32_t mask) {
  const ShortVector bits = __builtin_ia32_loaddquhi256_mask(reinterpret_cast<const short*>(from), ShortVector{},
                                                            static_cast<uint16_t>(mask));
  T values[kFloatLanes];
  store(values, bits);
  return load(values);
}

inline void store_lanes(float* to, const FloatVector& v, uint32_t mask) {
  __builtin_ia32_storeups512_mask(to, v, static_cast<uint16_t>(mask));
}
inline void store_lanes(double* to, const DoubleVector& v, uint32_t mask) {
  __builtin_ia32_storeupd512_mask(to, v, static_cast<uint8_t>(mask));
}
template <class T>
inline void store_lanes(T* to, const FloatVector& v, uint32_t mask) {
  T values[kFloatLanes];
  store_as(values, v);
  __builtin_ia32_storedquhi256_mask(reinterpret_cast<short*>(to), load_bytes<ShortVector>(values),
                                    static_cast<uint16_t>(mask));
}

inline uint32_t first_lanes(int64_t count) { return count > 0 ? (1u << count) - 1 : 0; }
#endif

// The first `count` lanes; the others are 0.
template <class T>
inline typename Compute<T>::Vector load_first(const T* from, int64_t count) {
  constexpr int lanes = Compute<T>::lanes;
  if (count >= lanes) return load(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return load_lanes(from, first_lanes(count));
#else
  T padded[lanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
#endif
}

template <class T>
inline void store_first(T* to, const typename Compute<T>::Vector& v, int64_t count) {
  constexpr int lanes = Compute<T>::lanes;
  if (count >= lanes) return store_as(to, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  store_lanes(to, v, first_lanes(count));
#else
  T padded[lanes];
  store_as(padded, v);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
#endif
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
