// Sums of h = act(scale * x + shift) over the rows of a matrix of columns (csrc/cpu/tiles.h), in each instruction set.
// Per-column values have `width` elements, accumulators `width + lanes`.
#pragma once

#include <cstdint>

#include "../simd/isa.h"
#include "../simd/normalized_matrix.h"
#include "../simd/per_element.h"

namespace biasloss {

template <class T>
struct PoolTable {
  using Scalar = AccumulatorOf<T>;

  using Matrix = NormalizedMatrix<T>;

  int64_t lanes;
  void (*sums)(const Matrix& m, Scalar* pivot, Scalar* sum);
  void (*moments)(const Matrix& m, Scalar* pivot, Scalar* sum, Scalar* squares);
  void (*add_totals)(int64_t rows, const Scalar* pivot, const Scalar* sum, int64_t width, double* total);
  void (*add_deviations)(int64_t rows, const Scalar* pivot, const Scalar* sum, const Scalar* squares,
                         const double* mean, int64_t width, double* total);
  // out = du = grad * act'(u), the same grad for every row; adds to the accumulators, to be settled after the last
  // call.
  void (*backward)(const Matrix& m, const Scalar* grad, const Scalar* center, Scalar* sum, Scalar* centered, T* out);
  void (*settle)(Scalar* accumulators, int64_t width);
  void (*add_sums)(const Scalar* sum, int64_t width, double* total);
};

using PoolTables = PerElement<PoolTable>;

BIASLOSS_TABLE_FOR_THIS_CPU(PoolTables, pool_tables, pool_tables)

}  // namespace biasloss
