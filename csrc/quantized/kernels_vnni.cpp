// Compiled once, for AVX-512 with VNNI.
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "../simd/activation.h"
#include "../simd/vector.h"
#include "kernels.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// sum[i] += a[4i] * b[4i] + ... + a[4i + 3] * b[4i + 3], a unsigned and b signed.
inline IntVector dot(const IntVector& sum, const IntVector& a, const IntVector& b) {
  return bits_as<IntVector>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(a), bits_as<__m512i>(b)));
}

inline IntVector load_ints(const void* from) { return load_bytes<IntVector>(from); }

// gcc 12 takes the vectors of __builtin_convertvector between bytes and integers apart.
inline IntVector load_wide(const uint8_t* from) {
  return bits_as<IntVector>(_mm512_maskz_cvtepu8_epi32(0xffff, load_bytes<__m128i>(from)));
}

// Of at most 16 bytes, behind which none are read.
inline IntVector load_wide(const uint8_t* from, int64_t count) {
  const auto bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from);
  return bits_as<IntVector>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes));
}

inline FloatVector floats(const IntVector& v) { return __builtin_convertvector(v, FloatVector); }

// Rounds value * factor + zero to the nearest of 0 to 255, ties to even: a float of this size has no fraction bits, so
// the sum rounds, and its last byte is the result.
struct Rounding {
  static constexpr float kBase = 0x1.8p23f;

  explicit Rounding(int32_t zero)
      : zero(_mm512_set1_ps(kBase + float(zero))), low(_mm512_set1_ps(kBase)), high(_mm512_set1_ps(kBase + 255)) {}
  void store(const FloatVector& value, const FloatVector& factor, uint8_t* to, int64_t count) const {
    const __m512 rounded = _mm512_fmadd_ps(bits_as<__m512>(value), bits_as<__m512>(factor), zero);
    // With a mask of all, as elsewhere: without one, gcc 12 warns of its own headers.
    const __m512 bounded = _mm512_maskz_min_ps(0xffff, _mm512_maskz_max_ps(0xffff, rounded, low), high);
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_castps_si512(bounded));
    if (count >= kOutputs)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
    else
      _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), bytes);
  }

  __m512 zero, low, high;
};

// A product that the compiler must not contract with a sum that follows: a multiply-add rounds otherwise.
inline FloatVector product(const FloatVector& a, const FloatVector& b) { return hidden(a * b); }

template <int rows, int vectors>
void multiply_block(const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t depth, const int32_t* bias,
                    int32_t* sums) {
  IntVector sum[rows][vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const IntVector of_bias = load_ints(bias + v * kOutputs);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) sum[r][v] = of_bias;
  }
  for (int64_t k = 0; k < depth; k += kDotDepth) {
    IntVector of_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) of_b[v] = load_ints(b + (v * depth + k) * kOutputs);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * a_stride + k, sizeof(four));
      const IntVector of_a = IntVector{} + four;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = dot(sum[r][v], of_a, of_b[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(sums + r * kPanel + v * kOutputs, sum[r][v]);
}

// The last block overlaps the one before it: its rows are computed twice, to the same sums.
template <int block, int vectors>
void multiply_rows(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* b, int64_t depth,
                   const int32_t* bias, int32_t* sums) {
  if (rows < block) {
    for (int64_t row = 0; row < rows; ++row)
      multiply_block<1, vectors>(a + row * a_stride, a_stride, b, depth, bias, sums + row * kPanel);
    return;
  }
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t first = std::min(row, rows - block);
    multiply_block<block, vectors>(a + first * a_stride, a_stride, b, depth, bias, sums + first * kPanel);
  }
}

void multiply(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* b, int64_t depth, int64_t outputs,
              const int32_t* bias, int32_t* sums) {
  switch (outputs / kOutputs) {
    case 1:
      return multiply_rows<12, 1>(a, a_stride, rows, b, depth, bias, sums);
    case 2:
      return multiply_rows<12, 2>(a, a_stride, rows, b, depth, bias, sums);
    case 3:
      return multiply_rows<8, 3>(a, a_stride, rows, b, depth, bias, sums);
    default:
      return multiply_rows<6, 4>(a, a_stride, rows, b, depth, bias, sums);
  }
}

template <Activation activation>
void finish_as(const Finish& of, const int32_t* sums, int64_t sums_stride, int64_t rows, int64_t outputs,
               const Target& to) {
  const Rounding rounding(of.y.zero);
  const FloatVector inverse = FloatVector{} + 1 / of.y.step, residual_step = FloatVector{} + of.residual_levels.step;
  const auto value = [&](int64_t row, int64_t output, const FloatVector& scale) {
    return activate<activation>(product(floats(load_ints(sums + row * sums_stride + output)), scale));
  };
  for (int64_t output = 0; output < outputs; output += kOutputs) {
    const int64_t count = std::min(kOutputs, outputs - output);
    const FloatVector scale = load(of.scale + output);
    if (to.residual == nullptr && to.bytes != nullptr && count == kOutputs) {
      for (int64_t row = 0; row < rows; ++row)
        rounding.store(value(row, output, scale), inverse, to.bytes + row * to.stride + output, kOutputs);
      continue;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * to.stride + output;
      FloatVector y = value(row, output, scale);
      if (to.residual != nullptr) {
        const IntVector q = load_wide(to.residual + at, count);
        y += product(floats(q - of.residual_levels.zero), residual_step);
      }
      if (to.bytes != nullptr)
        rounding.store(y, inverse, to.bytes + at, count);
      else
        __builtin_memcpy(to.floats + at, &y, count * sizeof(float));
    }
  }
}

void finish(const Finish& of, const int32_t* sums, int64_t sums_stride, int64_t rows, int64_t outputs,
            const Target& to) {
  with_activation(of.activation, [&](auto known) { finish_as<known.value>(of, sums, sums_stride, rows, outputs, to); });
}

// A vector of 4 columns x 16 channels as 16 channels x 4 columns.
inline __m512i transposed(__m512i columns) {
  const __m512i pieces = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(_mm512_maskz_permutexvar_epi32(0xffff, pieces, columns),
                             _mm512_maskz_broadcast_i32x4(0xffff, bytes));
}

void interleave(const uint8_t* x, int64_t stride, int64_t channels, int64_t width, int64_t left, int64_t groups,
                uint8_t zero, uint8_t* to) {
  const __m128i outside = _mm_set1_epi8(static_cast<char>(zero));
  const __mmask16 lanes = static_cast<__mmask16>((1u << channels) - 1);
  const auto column = [&](int64_t j) {
    if (x == nullptr || j < 0 || j >= width) return outside;
    return _mm_maskz_loadu_epi8(lanes, x + j * stride);
  };
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t j = group * kColumnGroup - left;
    __m512i columns = _mm512_castsi128_si512(column(j));
    columns = _mm512_inserti32x4(columns, column(j + 1), 1);
    columns = _mm512_inserti32x4(columns, column(j + 2), 2);
    columns = _mm512_inserti32x4(columns, column(j + 3), 3);
    _mm512_storeu_si512(to + group * kColumnGroup * kOutputs, transposed(columns));
  }
}

// Output column `phase` of a group begins at column phase * stride of it, and may reach into the next group. Weights
// are laid out for this: for each row and phase two vectors, one for each group.
template <int kernel, int stride>
void depthwise_row(const uint8_t* const* rows, int64_t groups, const int8_t* weights, const int32_t* bias,
                   int32_t* sums) {
  constexpr int phases = kColumnGroup / stride, kVector = BIASLOSS_VECTOR_BYTES;
  const IntVector of_bias = load_ints(bias);
  for (int64_t group = 0; group < groups; ++group) {
    IntVector sum[phases];
#pragma GCC unroll 4
    for (int phase = 0; phase < phases; ++phase) sum[phase] = of_bias;
#pragma GCC unroll 5
    for (int k = 0; k < kernel; ++k) {
      const IntVector here = load_ints(rows[k] + group * kVector), next = load_ints(rows[k] + (group + 1) * kVector);
#pragma GCC unroll 4
      for (int phase = 0; phase < phases; ++phase) {
        const int8_t* of = weights + (k * phases + phase) * 2 * kVector;
        sum[phase] = dot(sum[phase], here, load_ints(of));
        if (phase * stride + kernel > kColumnGroup) sum[phase] = dot(sum[phase], next, load_ints(of + kVector));
      }
    }
#pragma GCC unroll 4
    for (int phase = 0; phase < phases; ++phase) store(sums + (group * phases + phase) * kOutputs, sum[phase]);
  }
}

auto depthwise(int64_t kernel, int64_t stride) -> decltype(&depthwise_row<3, 1>) {
  if (kernel == 3) return stride == 1 ? &depthwise_row<3, 1> : stride == 2 ? &depthwise_row<3, 2> : nullptr;
  if (kernel == 5) return stride == 1 ? &depthwise_row<5, 1> : stride == 2 ? &depthwise_row<5, 2> : nullptr;
  return nullptr;
}

void quantize(const float* x, int64_t count, Levels levels, uint8_t* to) {
  const Rounding rounding(levels.zero);
  const FloatVector inverse = FloatVector{} + 1 / levels.step;
  int64_t i = 0;
  for (; i + kOutputs <= count; i += kOutputs) rounding.store(load(x + i), inverse, to + i, kOutputs);
  if (i == count) return;
  float last[kOutputs] = {};
  __builtin_memcpy(last, x + i, (count - i) * sizeof(float));
  rounding.store(load(last), inverse, to + i, count - i);
}

void dequantize(const uint8_t* x, int64_t count, Levels levels, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float(x[i] - levels.zero) * levels.step;
}

// Calls f(c, count, vectors) for whole groups of vectors of 16 channels, a constant number at once, then for what is
// left: a cache line of each pixel is used while it is there.
template <class F>
void by_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kPanel <= channels; c += kPanel) f(c, kOutputs, std::integral_constant<int, 4>());
  for (; c < channels; c += kOutputs) f(c, std::min(kOutputs, channels - c), std::integral_constant<int, 1>());
}

void gate(const uint8_t* x, int64_t rows, int64_t channels, const float* gate, Levels levels, Levels y, uint8_t* to) {
  const Rounding rounding(y.zero);
  const FloatVector ratio = FloatVector{} + levels.step * (1 / y.step);
  by_channels(channels, [&](int64_t c, int64_t count, auto vectors) {
    FloatVector factor[vectors];
    for (int v = 0; v < vectors; ++v) {
      float padded[kOutputs] = {};
      __builtin_memcpy(padded, gate + c + v * kOutputs, count * sizeof(float));
      factor[v] = product(load(padded), ratio);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = row * channels + c + v * kOutputs;
        rounding.store(floats(load_wide(x + at, count) - levels.zero), factor[v], to + at, count);
      }
  });
}

void add_up(const uint8_t* x, int64_t rows, int64_t stride, int64_t count, int32_t* sums) {
  by_channels(count, [&](int64_t c, int64_t own, auto vectors) {
    IntVector sum[vectors] = {};
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < vectors; ++v) sum[v] += load_wide(x + row * stride + c + v * kOutputs, own);
    for (int v = 0; v < vectors; ++v)
      for (int i = 0; i < own; ++i) sums[c + v * kOutputs + i] += sum[v][i];
  });
}

void average(const uint8_t* x, int64_t rows, int64_t row_stride, int64_t columns, int64_t channels, uint8_t* to) {
  const Rounding rounding(0);
  const FloatVector factor = FloatVector{} + 1.0f / float(rows * columns);
  for (int64_t c = 0; c < channels; c += kOutputs) {
    const int64_t count = std::min(kOutputs, channels - c);
    IntVector sum = {};
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t q = 0; q < columns; ++q) sum += load_wide(x + row * row_stride + q * channels + c, count);
    rounding.store(floats(sum), factor, to + c, count);
  }
}

}  // namespace

extern const QuantizedTable quantized_table;
const QuantizedTable quantized_table = {&multiply,   &finish, &interleave, &depthwise, &quantize,
                                        &dequantize, &gate,   &add_up,     &average};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
