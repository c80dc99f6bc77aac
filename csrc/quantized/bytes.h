// What the kernels on bytes take from the instruction set: AVX-512 with VNNI, or AVX2. For *_int8.cpp files only.
//
// AVX2 adds two products in 16 bits, and saturates. No pair of weights that are packed for these kernels can reach that
// (biasloss_ext/ops/program/packing.py), so both instruction sets compute the same sums.
#pragma once

#include <immintrin.h>

#include "../simd/vector.h"
#include "kernels.h"

namespace biasloss {
namespace BIASLOSS_ISA {

constexpr int64_t kLanes = kFloatLanes;
constexpr int64_t kVectorBytes = BIASLOSS_VECTOR_BYTES;
constexpr int64_t kParts = kOutputs / kLanes;  // vectors of 16 outputs

inline IntVector load_ints(const void* from) { return load_bytes<IntVector>(from); }

inline FloatVector floats(const IntVector& v) { return __builtin_convertvector(v, FloatVector); }

constexpr float kRoundingBase = 0x1.8p23f;  // a float of this size has no fraction bits

#if defined(__AVX512VNNI__)

// sum[i] += a[4i] * b[4i] + ... + a[4i + 3] * b[4i + 3], a unsigned and b signed.
inline IntVector dot(const IntVector& sum, const IntVector& a, const IntVector& b) {
  return bits_as<IntVector>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(a), bits_as<__m512i>(b)));
}

// gcc 12 takes the vectors of __builtin_convertvector between bytes and integers apart.
inline IntVector load_wide(const uint8_t* from) {
  return bits_as<IntVector>(_mm512_maskz_cvtepu8_epi32(0xffff, load_bytes<__m128i>(from)));
}

// Of the first `count` bytes, at most 16, with zeros behind; no others are read.
inline __m128i load_some(const uint8_t* from, int64_t count) {
  return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from);
}

inline IntVector load_wide(const uint8_t* from, int64_t count) {
  return bits_as<IntVector>(_mm512_maskz_cvtepu8_epi32(0xffff, load_some(from, count)));
}

// The last byte of each number.
inline void store_bytes(const FloatVector& bits, uint8_t* to, int64_t count) {
  // The mask selects all lanes, here and below: without one, gcc 12 warns about its own headers.
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, bits_as<__m512i>(bits));
  if (count >= kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  else
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), bytes);
}

inline FloatVector multiply_add(const FloatVector& a, const FloatVector& b, const FloatVector& c) {
  return bits_as<FloatVector>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
}

// NaN becomes `low`.
inline FloatVector bounded(const FloatVector& x, const FloatVector& low, const FloatVector& high) {
  const __m512 above = _mm512_maskz_max_ps(0xffff, bits_as<__m512>(x), bits_as<__m512>(low));
  return bits_as<FloatVector>(_mm512_maskz_min_ps(0xffff, above, bits_as<__m512>(high)));
}

// 4 columns x 16 channels as 16 channels x 4 columns, in the order of kColumnOrder.
inline void store_group(__m128i a, __m128i b, __m128i c, __m128i d, uint8_t* to) {
  __m512i columns = _mm512_castsi128_si512(a);
  columns = _mm512_inserti32x4(columns, c, 1);
  columns = _mm512_inserti32x4(columns, b, 2);
  columns = _mm512_inserti32x4(columns, d, 3);
  const __m512i pieces = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_shuffle_epi8(_mm512_maskz_permutexvar_epi32(0xffff, pieces, columns),
                                              _mm512_maskz_broadcast_i32x4(0xffff, bytes)));
}

#else

inline IntVector dot(const IntVector& sum, const IntVector& a, const IntVector& b) {
  const __m256i pairs = _mm256_maddubs_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b));
  return sum + bits_as<IntVector>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline IntVector load_wide(const uint8_t* from) {
  return bits_as<IntVector>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from)));
}

template <class Number>
inline Number number_at(const uint8_t* from) {
  Number number;
  __builtin_memcpy(&number, from, sizeof(number));
  return number;
}

// The first `count` bytes, at most 8, of a number; those of two loads where they are 4 or more.
inline uint64_t some_of_eight(const uint8_t* from, int64_t count) {
  if (count >= 8) return number_at<uint64_t>(from);
  if (count >= 4) {
    const uint64_t last = number_at<uint32_t>(from + count - 4);
    return number_at<uint32_t>(from) | last << (8 * (count - 4));
  }
  uint64_t number = 0;
  for (int64_t i = 0; i < count; ++i) number |= uint64_t(from[i]) << (8 * i);
  return number;
}

inline __m128i load_some(const uint8_t* from, int64_t count) {
  if (count >= 16) return load_bytes<__m128i>(from);
  const uint64_t first = some_of_eight(from, count);
  return _mm_set_epi64x(count > 8 ? some_of_eight(from + 8, count - 8) : 0, first);
}

inline IntVector load_wide(const uint8_t* from, int64_t count) {
  if (count >= kLanes) return load_wide(from);
  return bits_as<IntVector>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(some_of_eight(from, count))));
}

inline void store_bytes(const FloatVector& bits, uint8_t* to, int64_t count) {
  const __m256i first = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
  const __m256i fours = _mm256_shuffle_epi8(bits_as<__m256i>(bits), first);
  const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  if (count >= kLanes)
    _mm_storeu_si64(to, bytes);
  else
    __builtin_memcpy(to, &bytes, count);
}

inline FloatVector multiply_add(const FloatVector& a, const FloatVector& b, const FloatVector& c) {
  return bits_as<FloatVector>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
}

inline FloatVector bounded(const FloatVector& x, const FloatVector& low, const FloatVector& high) {
  const __m256 above = _mm256_max_ps(bits_as<__m256>(x), bits_as<__m256>(low));
  return bits_as<FloatVector>(_mm256_min_ps(above, bits_as<__m256>(high)));
}

inline void store_group(__m128i a, __m128i b, __m128i c, __m128i d, uint8_t* to) {
  __m128i* const parts = reinterpret_cast<__m128i*>(to);
  const __m128i first = _mm_unpacklo_epi8(a, c), second = _mm_unpacklo_epi8(b, d);
  const __m128i third = _mm_unpackhi_epi8(a, c), fourth = _mm_unpackhi_epi8(b, d);
  _mm_storeu_si128(parts, _mm_unpacklo_epi16(first, second));
  _mm_storeu_si128(parts + 1, _mm_unpackhi_epi16(first, second));
  _mm_storeu_si128(parts + 2, _mm_unpacklo_epi16(third, fourth));
  _mm_storeu_si128(parts + 3, _mm_unpackhi_epi16(third, fourth));
}

#endif

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
