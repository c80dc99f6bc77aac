// Sums over the rows of a matrix, column by column (see csrc/cpu/tiles.h). For *_simd.cpp files only.
//
// Where the width is no multiple of the vector, the last vector of a row overlaps the one before it. Accumulators
// therefore need room for `lanes` values more than the width: the last vector has its own behind the others, and
// `settle` moves what is new in it to its columns.
#pragma once

#include "activation.h"
#include "vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {

constexpr int kRowsAtOnce = 4;  // a load and a store of each accumulator serve so many rows

// Calls f(column, slot) for every vector of a row of width >= lanes; slot is where its accumulators lie.
template <int lanes, class F>
inline void for_each_vector(int64_t width, const F& f) {
  // One call in the code for whole and overlapping vectors: every body is compiled once.
  for (int64_t slot = 0; slot < width; slot += lanes) f(slot + lanes <= width ? slot : width - lanes, slot);
}

template <int lanes, class Scalar>
inline void settle(Scalar* accumulators, int64_t width) {
  const int64_t rest = width % lanes;
  Scalar* last = accumulators + width - rest;
  for (int64_t i = 0; rest > 0 && i < rest; ++i) last[i] = last[lanes - rest + i];
}

// Calls f(row, count) with up to kRowsAtOnce rows.
template <class F>
inline void for_each_rows(int64_t rows, const F& f) {
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) f(row, rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce);
}

// sum and squares, of (h - pivot) and its square, for every column; h = act(scale * x + shift) or x itself.
template <Activation activation, bool affine, bool squared, class T, class Scalar>
inline void accumulate(const T* x, int64_t rows, int64_t width, const Scalar* scale, const Scalar* shift,
                       const Scalar* pivot, Scalar* sum, Scalar* squares) {
  using V = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  for (int64_t j = 0; j < width + lanes; ++j) sum[j] = 0;
  for (int64_t j = 0; squared && j < width + lanes; ++j) squares[j] = 0;
  for_each_rows(rows, [&](int64_t row, int64_t at_once) {
    const T* from = x + row * width;
    for_each_vector<lanes>(width, [&](int64_t j, int64_t slot) {
      V a = {}, b = {}, u = {}, v = {};
      const V m = load(pivot + j);
      if constexpr (affine) a = load(scale + j), b = load(shift + j);
      for (int r = 0; r < at_once; ++r) {
        V h = load(from + r * width + j);
        if constexpr (affine) h = activate<activation>(h * a + b);
        h -= m;
        u += h;
        if constexpr (squared) v += h * h;
      }
      store(sum + slot, load(sum + slot) + u);
      if constexpr (squared) store(squares + slot, load(squares + slot) + v);
    });
  });
  settle<lanes>(sum, width);
  if constexpr (squared) settle<lanes>(squares, width);
}

// The same about a pivot that is found here: the mean over the first rows. At most 16 rows are summed for each of
// those, which bounds the sum of squares that is rounded by a small multiple of the sum of squared deviations that is
// sought, wherever the outliers lie. A sum alone needs no pivot: 0.
template <Activation activation, bool affine, bool squared, class T, class Scalar>
inline void column_moments(const T* x, int64_t rows, int64_t width, const Scalar* scale, const Scalar* shift,
                           Scalar* pivot, Scalar* sum, Scalar* squares) {
  constexpr int lanes = Compute<T>::lanes;
  for (int64_t j = 0; j < width + lanes; ++j) pivot[j] = 0;
  if (squared && rows > 0) {
    const int64_t first = (rows + 15) / 16;
    accumulate<activation, affine, false>(x, first, width, scale, shift, pivot, sum, squares);
    for (int64_t j = 0; j < width; ++j) pivot[j] = sum[j] / Scalar(first);
  }
  accumulate<activation, affine, squared>(x, rows, width, scale, shift, pivot, sum, squares);
}

// What combines the partial sums of chunks, in float64.
template <class Scalar>
inline void add_sums(const Scalar* sum, int64_t width, double* total) {
  for (int64_t j = 0; j < width; ++j) total[j] += sum[j];
}

// The sum of h over a chunk.
template <class Scalar>
inline void add_totals(int64_t rows, const Scalar* pivot, const Scalar* sum, int64_t width, double* total) {
  for (int64_t j = 0; j < width; ++j) total[j] += double(rows) * double(pivot[j]) + double(sum[j]);
}

// The sum of (h - mean)^2 over a chunk.
template <class Scalar>
inline void add_deviations(int64_t rows, const Scalar* pivot, const Scalar* sum, const Scalar* squares,
                           const double* mean, int64_t width, double* total) {
  for (int64_t j = 0; j < width; ++j) {
    const double d = mean[j] - double(pivot[j]);
    total[j] += double(squares[j]) + d * (double(rows) * d - 2 * double(sum[j]));
  }
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
