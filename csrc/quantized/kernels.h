// Kernels on maps of bytes: products of unsigned activations and signed weights, summed up in int32, and what makes
// bytes of the sums. The sums are exact, and what follows is computed value by value, so results depend on no split of
// the work and on no instruction set, but for the last bits of exponentials. See biasloss_ext/ops/program/quantized.py
// for what each computes.
#pragma once

#include <cstdint>

#include "../math/activations.h"

namespace biasloss {

// A byte q stands for step * (q - zero).
struct Levels {
  float step;
  int32_t zero;
};

// How sums become results: act(sum * scale[output]) + residual, rounded to the levels of y where `to_bytes` is given.
struct Finish {
  const float* scale;  // whole vectors of 16, as all values by output
  Activation activation;
  Levels y, residual_levels;
};

// Where the results of some rows lie; each row has `stride` values. One of the first two is given.
struct Target {
  uint8_t* bytes;
  float* floats;
  const uint8_t* residual;  // null where there is none
  int64_t stride;
};

constexpr int64_t kOutputs = 16;  // of a vector of sums
constexpr int64_t kDotDepth = 4;  // products that go into a sum at once
constexpr int64_t kPanel = 4 * kOutputs;
constexpr int64_t kTileRows = 24;
// Columns of a map that lie together, channel by channel, for a depthwise convolution. Their order is 0, 2, 1, 3: AVX2
// adds up pairs first, and taps that are neighbors would be the largest pairs.
constexpr int64_t kColumnGroup = 4;

// Groups of columns that a row of a window meets, wherever in its first group it begins.
constexpr int groups_of_window(int64_t kernel, int64_t stride) {
  return static_cast<int>((kColumnGroup - stride + kernel + kColumnGroup - 1) / kColumnGroup);
}

struct QuantizedTable {
  // sums[row][output] = bias[output] + sum over k of a[row][k] * b[output][k], for at most kTileRows rows and kPanel
  // outputs, a whole number of vectors. Rows of a lie a_stride bytes apart; b holds for each vector of outputs, for
  // each four k, 16 x 4 values. depth is a multiple of 4. Rows of sums have kPanel values.
  void (*multiply)(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* b, int64_t depth, int64_t outputs,
                   const int32_t* bias, int32_t* sums);
  // Rows of results from rows of sums, which lie sums_stride values apart.
  void (*finish)(const Finish& finish, const int32_t* sums, int64_t sums_stride, int64_t rows, int64_t outputs,
                 const Target& to);
  // `channels` (at most 16) channels of a row of `width` pixels, each `stride` bytes after the one before it, as groups
  // of 16 channels x 4 columns. The row begins with `left` columns of `zero`, and is filled up by such columns. A null
  // x is a row of such columns.
  void (*interleave)(const uint8_t* x, int64_t stride, int64_t channels, int64_t width, int64_t left, int64_t groups,
                     uint8_t zero, uint8_t* to);
  // Sums of a row of a depthwise convolution for 16 channels, four columns of x at a time: `groups` times 4 / stride
  // columns of 16. `rows` are kernel interleaved ones of groups + groups_of_window - 1 groups. Null where there is no
  // such kernel.
  void (*(*depthwise)(int64_t kernel, int64_t stride))(const uint8_t* const* rows, int64_t groups,
                                                       const int8_t* weights, const int32_t* bias, int32_t* sums);
  void (*quantize)(const float* x, int64_t count, Levels levels, uint8_t* to);
  void (*dequantize)(const uint8_t* x, int64_t count, Levels levels, float* to);
  // Bytes times a gate by channel: to levels y.
  void (*gate)(const uint8_t* x, int64_t rows, int64_t channels, const float* gate, Levels levels, Levels y,
               uint8_t* to);
  // Adds `rows` rows of `count` bytes, `stride` apart, to sums.
  void (*add_up)(const uint8_t* x, int64_t rows, int64_t stride, int64_t count, int32_t* sums);
  // The rounded average by channel over rows x columns pixels; rows lie row_stride bytes apart, pixels `channels`.
  void (*average)(const uint8_t* x, int64_t rows, int64_t row_stride, int64_t columns, int64_t channels, uint8_t* to);
};

// Raises where the CPU or the build has none.
const QuantizedTable& quantized_table();

}  // namespace biasloss
