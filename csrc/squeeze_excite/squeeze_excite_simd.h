// Products of a few rows with small weight matrices, and activations, in each instruction set. Results do not depend on
// how the columns are split, if the parts begin at multiples of 16.
#pragma once

#include <cstdint>

#include "../math/activation_names.h"
#include "../simd/isa.h"
#include "../simd/per_element.h"

namespace biasloss {

template <class T>
struct SqueezeExciteTable {
  // out[m][n] = bias[n] + sum over k of x[m][k] * weight[n][k], for n in [begin, end). x is (rows, depth), weight
  // (any, depth); a row of out has `width` values.
  void (*linear)(const T* x, int64_t rows, int64_t depth, const T* weight, const T* bias, int64_t begin, int64_t end,
                 T* out, int64_t width);
  // out[m][n] = sum over k of a[m * row_stride + k * depth_stride] * b[k][n], for n in [begin, end); rows of b and out
  // have `width` values.
  void (*combine)(const T* a, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth, const T* b,
                  int64_t begin, int64_t end, T* out, int64_t width);
  void (*activate)(Activation activation, const T* u, int64_t count, T* h);
  // out = grad * act'(u)
  void (*gradient)(Activation activation, const T* grad, const T* u, int64_t count, T* out);
};

using SqueezeExciteTables = PerScalar<SqueezeExciteTable>;

BIASLOSS_TABLE_FOR_THIS_CPU(SqueezeExciteTables, squeeze_excite_tables, squeeze_excite_tables)

}  // namespace biasloss
