// Compiled for each instruction set that multiplies bytes (see bytes.h).
#include <algorithm>
#include <type_traits>

#include "../simd/activation.h"
#include "bytes.h"
#include "kernels.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// Rounds value * factor + zero to the nearest of 0 to 255, ties to even: a float of the base's size has no fraction
// bits, so the sum rounds, and its last byte is the result.
struct Rounding {
  explicit Rounding(int32_t zero) : zero(FloatVector{} + (kRoundingBase + float(zero))) {}
  void store(const FloatVector& value, const FloatVector& factor, uint8_t* to, int64_t count) const {
    const FloatVector low = FloatVector{} + kRoundingBase, high = FloatVector{} + (kRoundingBase + 255);
    store_bytes(bounded(multiply_add(value, factor, zero), low, high), to, count);
  }

  FloatVector zero;
};

// A product that the compiler must not contract with a sum that follows: a multiply-add rounds otherwise.
inline FloatVector product(const FloatVector& a, const FloatVector& b) { return hidden(a * b); }

// Sums of some rows and vectors, which stay in registers.
template <int rows, int vectors>
void multiply_block(const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t depth, const int32_t* bias,
                    int32_t* sums) {
  IntVector sum[rows][vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const IntVector of_bias = load_ints(bias + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) sum[r][v] = of_bias;
  }
  for (int64_t k = 0; k < depth; k += kDotDepth) {
    IntVector of_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      of_b[v] = load_ints(b + (v / kParts * depth + k) * kOutputs + v % kParts * kVectorBytes);
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
    for (int v = 0; v < vectors; ++v) store(sums + r * kPanel + v * kLanes, sum[r][v]);
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

#if BIASLOSS_VECTOR_BYTES == 64
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
#else
// 16 registers hold the sums of 6 rows x 16 outputs.
void multiply(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* b, int64_t depth, int64_t outputs,
              const int32_t* bias, int32_t* sums) {
  for (int64_t output = 0; output < outputs; output += kOutputs)
    multiply_rows<6, kParts>(a, a_stride, rows, b + output * depth, depth, bias + output, sums + output);
}
#endif

template <Activation activation>
void finish_as(const Finish& of, const int32_t* sums, int64_t sums_stride, int64_t rows, int64_t outputs,
               const Target& to) {
  const Rounding rounding(of.y.zero);
  const FloatVector inverse = FloatVector{} + 1 / of.y.step, residual_step = FloatVector{} + of.residual_levels.step;
  const auto value = [&](int64_t row, int64_t output, const FloatVector& scale) {
    return activate<activation>(product(floats(load_ints(sums + row * sums_stride + output)), scale));
  };
  for (int64_t output = 0; output < outputs; output += kLanes) {
    const int64_t count = std::min(kLanes, outputs - output);
    const FloatVector scale = load(of.scale + output);
    if (to.residual == nullptr && to.bytes != nullptr && count == kLanes) {
      for (int64_t row = 0; row < rows; ++row)
        rounding.store(value(row, output, scale), inverse, to.bytes + row * to.stride + output, kLanes);
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

void interleave(const uint8_t* x, int64_t stride, int64_t channels, int64_t width, int64_t left, int64_t groups,
                uint8_t zero, uint8_t* to) {
  const __m128i outside = _mm_set1_epi8(static_cast<char>(zero));
  const auto column = [&](int64_t j) {
    return x == nullptr || j < 0 || j >= width ? outside : load_some(x + j * stride, channels);
  };
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t j = group * kColumnGroup - left;
    store_group(column(j), column(j + 1), column(j + 2), column(j + 3), to + group * kColumnGroup * kOutputs);
  }
}

// Output column `phase` of a group begins at column phase * stride of it, and reaches into the groups that follow.
// Weights are laid out for this: for each row and phase, the vectors that meet a window's groups.
template <int kernel, int stride>
void depthwise_row(const uint8_t* const* rows, int64_t groups, const int8_t* weights, const int32_t* bias,
                   int32_t* sums) {
  constexpr int phases = kColumnGroup / stride, reach = groups_of_window(kernel, stride);
  constexpr int64_t kGroup = kColumnGroup * kOutputs;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t part = 0; part < kParts; ++part) {
      const IntVector of_bias = load_ints(bias + part * kLanes);
      IntVector sum[phases];
#pragma GCC unroll 4
      for (int phase = 0; phase < phases; ++phase) sum[phase] = of_bias;
      const int8_t* of = weights + part * kVectorBytes;
      for (int k = 0; k < kernel; ++k, of += phases * reach * kGroup) {
        const uint8_t* x = rows[k] + group * kGroup + part * kVectorBytes;
#pragma GCC unroll 3
        for (int next = 0; next < reach; ++next) {
          const IntVector columns = load_ints(x + next * kGroup);
#pragma GCC unroll 4
          for (int phase = 0; phase < phases; ++phase)
            if (phase * stride + kernel > next * kColumnGroup)
              sum[phase] = dot(sum[phase], columns, load_ints(of + (phase * reach + next) * kGroup));
        }
      }
#pragma GCC unroll 4
      for (int phase = 0; phase < phases; ++phase)
        store(sums + (group * phases + phase) * kOutputs + part * kLanes, sum[phase]);
    }
}

template <int kernel>
auto depthwise_of_stride(int64_t stride) -> decltype(&depthwise_row<3, 1>) {
  return stride == 1 ? &depthwise_row<kernel, 1> : stride == 2 ? &depthwise_row<kernel, 2> : nullptr;
}

auto depthwise(int64_t kernel, int64_t stride) -> decltype(&depthwise_row<3, 1>) {
  switch (kernel) {
    case 3:
      return depthwise_of_stride<3>(stride);
    case 5:
      return depthwise_of_stride<5>(stride);
    case 7:
      return depthwise_of_stride<7>(stride);
    default:
      return nullptr;
  }
}

void quantize(const float* x, int64_t count, Levels levels, uint8_t* to) {
  const Rounding rounding(levels.zero);
  const FloatVector inverse = FloatVector{} + 1 / levels.step;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) rounding.store(load(x + i), inverse, to + i, kLanes);
  if (i == count) return;
  float last[kLanes] = {};
  __builtin_memcpy(last, x + i, (count - i) * sizeof(float));
  rounding.store(load(last), inverse, to + i, count - i);
}

void dequantize(const uint8_t* x, int64_t count, Levels levels, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float(x[i] - levels.zero) * levels.step;
}

// Calls f(c, count, vectors) for whole groups of vectors of channels, a constant number at once, then for what is
// left: a cache line of each pixel is used while it is there.
template <class F>
void by_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kPanel <= channels; c += kPanel) f(c, kLanes, std::integral_constant<int, kPanel / kLanes>());
  for (; c < channels; c += kLanes) f(c, std::min(kLanes, channels - c), std::integral_constant<int, 1>());
}

void gate(const uint8_t* x, int64_t rows, int64_t channels, const float* gate, Levels levels, Levels y, uint8_t* to) {
  const Rounding rounding(y.zero);
  const FloatVector ratio = FloatVector{} + levels.step * (1 / y.step);
  by_channels(channels, [&](int64_t c, int64_t count, auto vectors) {
    FloatVector factor[vectors];
    for (int v = 0; v < vectors; ++v) {
      float padded[kLanes] = {};
      __builtin_memcpy(padded, gate + c + v * kLanes, count * sizeof(float));
      factor[v] = product(load(padded), ratio);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = row * channels + c + v * kLanes;
        rounding.store(floats(load_wide(x + at, count) - levels.zero), factor[v], to + at, count);
      }
  });
}

void add_up(const uint8_t* x, int64_t rows, int64_t stride, int64_t count, int32_t* sums) {
  by_channels(count, [&](int64_t c, int64_t own, auto vectors) {
    IntVector sum[vectors] = {};
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < vectors; ++v) sum[v] += load_wide(x + row * stride + c + v * kLanes, own);
    for (int v = 0; v < vectors; ++v)
      for (int i = 0; i < own; ++i) sums[c + v * kLanes + i] += sum[v][i];
  });
}

void average(const uint8_t* x, int64_t rows, int64_t row_stride, int64_t columns, int64_t channels, uint8_t* to) {
  const Rounding rounding(0);
  const FloatVector factor = FloatVector{} + 1.0f / float(rows * columns);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t count = std::min(kLanes, channels - c);
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
