// Products of a few rows with small weight matrices, and activations, in each instruction set. Results do not depend on
// how the columns are split, if the parts begin at multiples of 16.
#pragma once

#include <cstdint>

#include "../math/activations.h"
#include "../math/matrix.h"
#include "../simd/isa.h"
#include "../simd/per_element.h"

namespace biasloss {

template <class T>
struct SqueezeExciteTable {
  // out[m][n] = bias[n] + sum over k of x[m][k] * weight[n][k], for n in [begin, end). x is (rows, depth) without gaps,
  // weight (any, depth).
  void (*linear)(Rows<const T> x, int64_t rows, const T* weight, const T* bias, int64_t begin, int64_t end,
                 Rows<T> out);
  // out[m][n] = sum over k < depth of a[m][k] * b[k][n], for n in [begin, end); a has `rows` rows, and those of b are
  // as far apart as those of out.
  void (*combine)(Strided<T> a, int64_t rows, int64_t depth, const T* b, int64_t begin, int64_t end, Rows<T> out);
  void (*activate)(Activation activation, const T* u, int64_t count, T* h);
  // out = grad * act'(u)
  void (*gradient)(Activation activation, const T* grad, const T* u, int64_t count, T* out);
};

using SqueezeExciteTables = PerScalar<SqueezeExciteTable>;

BIASLOSS_TABLE_FOR_THIS_CPU(SqueezeExciteTables, squeeze_excite_tables, squeeze_excite_tables)

}  // namespace biasloss
