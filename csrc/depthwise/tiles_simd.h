// The inner loops of a depthwise convolution: one channel vector, a tile of columns in registers. For *_simd.cpp files
// only. Loops over the taps of a row are unrolled; those over the kernel's rows are not, so that rows outside of the
// map cost nothing.
#pragma once

#include <type_traits>

#include "../simd/vector.h"
#include "rows_simd.h"

namespace biasloss {
namespace BIASLOSS_ISA {

template <class Scalar>
using VectorOf = typename Compute<Scalar>::Vector;

// Columns of a tile for maps of 2, 4, 8 or 16 columns, as networks for small images have them. Only for what these run,
// as every size of a tile is compiled for itself.
constexpr int kFewColumns = 4;

template <int kernel, class T>
inline constexpr bool kHasFewColumns = kernel < 7 && std::is_same_v<T, float>;

// Calls f with the columns of a tile that a row of `width` is best cut into, as a constant.
template <bool has_few, class F>
inline void with_tile(int64_t width, const F& f) {
  const auto covered = [width](int64_t tile) { return (width + tile - 1) / tile * tile; };
  if constexpr (has_few)
    if (covered(kFewColumns) < covered(kTileColumns)) return f(std::integral_constant<int, kFewColumns>());
  f(std::integral_constant<int, kTileColumns>());
}

// Adds a row of inputs to a tile of outputs: column(x) is the input column x behind the first that the tile reaches.
// Each is loaded once and added to the outputs that it reaches.
template <int kernel, int stride, class Scalar, class Column, int tile>
inline __attribute__((always_inline)) void add_row(const Scalar* weight, const Column& column,
                                                   VectorOf<Scalar> (&sum)[tile]) {
  constexpr int reach = (tile - 1) * stride + kernel;
  VectorOf<Scalar> tap[kernel];
#pragma GCC unroll 8
  for (int j = 0; j < kernel; ++j) tap[j] = load(weight + j * Compute<Scalar>::lanes);
#pragma GCC unroll 32
  for (int x = 0; x < reach; ++x) {
    const VectorOf<Scalar> value = column(x);
#pragma GCC unroll 8
    for (int j = 0; j < kernel; ++j)
      if (x >= j && (x - j) % stride == 0 && (x - j) / stride < tile) sum[(x - j) / stride] += value * tap[j];
  }
}

// sum[t] = y at columns column + t.
template <int kernel, int stride, class Scalar, int tile>
inline void convolve_tile(const Taps<Scalar>& taps, int64_t strip_offset, const Scalar* weight, int64_t column,
                          VectorOf<Scalar> (&sum)[tile]) {
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t offset = strip_offset + (column * stride - kernel / 2) * lanes;
  for (auto& s : sum) s = VectorOf<Scalar>{};
  for (int64_t row = 0; row < taps.count; ++row) {
    const Scalar* in = taps.rows[row].data + offset;
    add_row<kernel, stride>(
        weight + taps.rows[row].index * kernel * lanes, [&](int x) { return load(in + x * lanes); }, sum);
  }
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumnPairs = kTileColumns;
#else  // half as many registers
constexpr int kColumnPairs = kFewColumns;
#endif

// The data gradient at stride 2: sum[parity][t] = dh at columns 2 * (pair + t) + parity, each from the taps of its
// parity.
template <int kernel, class Scalar, int pairs>
inline void transposed_tile(const Taps<Scalar>& taps, int64_t strip_offset, const Scalar* weight, int64_t pair,
                            VectorOf<Scalar> (&sum)[2][pairs]) {
  constexpr int lanes = Compute<Scalar>::lanes, padding = kernel / 2;
  constexpr int first = -(padding / 2), last = pairs - 1 + (padding + 1) / 2;
  for (auto& parity : sum)
    for (auto& s : parity) s = VectorOf<Scalar>{};
  for (int64_t row = 0; row < taps.count; ++row) {
    const Scalar* in = taps.rows[row].data + strip_offset + pair * lanes;
    const Scalar* w = weight + taps.rows[row].index * kernel * lanes;
    VectorOf<Scalar> tap[kernel];
#pragma GCC unroll 8
    for (int j = 0; j < kernel; ++j) tap[j] = load(w + j * lanes);
#pragma GCC unroll 16
    for (int x = first; x <= last; ++x) {
      const VectorOf<Scalar> value = load(in + x * lanes);
#pragma GCC unroll 8
      for (int j = 0; j < kernel; ++j) {
        const int parity = (padding + j) % 2, t = x - (parity + padding - j) / 2;
        if (t >= 0 && t < pairs) sum[parity][t] += value * tap[j];
      }
    }
  }
}

// Adds the products of `width` columns of dy with `rows` rows of h, beginning with number `first` of the taps.
template <int kernel, int stride, int rows, class Scalar>
inline void weight_gradient_rows(const Scalar* dy, const Taps<Scalar>& taps, int64_t strip_offset, int64_t first,
                                 int64_t width, Scalar* grad_weight) {
  constexpr int lanes = Compute<Scalar>::lanes;
  VectorOf<Scalar> sum[rows][kernel] = {};
  const Scalar* in[rows];
  for (int r = 0; r < rows; ++r) in[r] = taps.rows[first + r].data + strip_offset - kernel / 2 * lanes;
  for (int64_t q = 0; q < width; ++q) {
    const VectorOf<Scalar> gradient = load(dy + q * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kernel; ++j) sum[r][j] += load(in[r] + (q * stride + j) * lanes) * gradient;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    Scalar* to = grad_weight + taps.rows[first + r].index * kernel * lanes;
#pragma GCC unroll 8
    for (int j = 0; j < kernel; ++j) store(to + j * lanes, load(to + j * lanes) + sum[r][j]);
  }
}

// As many rows at a time as there are registers for their sums, so that their additions hide each other's latency.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSumsInRegisters = 25;
#else
constexpr int kSumsInRegisters = 10;
#endif

template <int kernel, int stride, class Scalar>
inline void weight_gradient_vector(const Scalar* dy, const Taps<Scalar>& taps, int64_t strip_offset, int64_t width,
                                   Scalar* grad_weight) {
  constexpr int most = kSumsInRegisters / kernel < kernel ? kSumsInRegisters / kernel : kernel;
  int64_t row = 0;
  for (; row + most <= taps.count; row += most)
    weight_gradient_rows<kernel, stride, most>(dy, taps, strip_offset, row, width, grad_weight);
  if constexpr (most > 2)
    for (; row + 2 <= taps.count; row += 2)
      weight_gradient_rows<kernel, stride, 2>(dy, taps, strip_offset, row, width, grad_weight);
  for (; row < taps.count; ++row)
    weight_gradient_rows<kernel, stride, 1>(dy, taps, strip_offset, row, width, grad_weight);
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
