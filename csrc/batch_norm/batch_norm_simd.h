// The pieces of batch normalization on a matrix of columns (csrc/cpu/tiles.h), in each instruction set. Per-column
// values have `width` elements, accumulators `width + lanes`.
#pragma once

#include <cstdint>

#include "../simd/isa.h"
#include "../simd/normalized_matrix.h"
#include "../simd/per_element.h"

namespace biasloss {

template <class T>
struct BatchNormTable {
  using Scalar = AccumulatorOf<T>;

  using Matrix = NormalizedMatrix<T>;
  // dy = a * du + b * (y - center) + c
  struct Coefficients {
    const Scalar *a, *b, *c, *center;
  };

  int64_t lanes;
  void (*moments)(const T* y, int64_t rows, int64_t width, Scalar* pivot, Scalar* sum, Scalar* squares);
  void (*add_totals)(int64_t rows, const Scalar* pivot, const Scalar* sum, int64_t width, double* total);
  void (*add_deviations)(int64_t rows, const Scalar* pivot, const Scalar* sum, const Scalar* squares,
                         const double* mean, int64_t width, double* total);
  void (*apply)(const Matrix& m, const T* residual, T* out);  // residual may be null
  void (*sums)(const Matrix& m, const T* grad, const Scalar* center, Scalar* sum, Scalar* centered);
  void (*add_sums)(const Scalar* sum, int64_t width, double* total);
  void (*backward)(const Matrix& m, const T* grad, const Coefficients& k, T* out);
};

using BatchNormTables = PerElement<BatchNormTable>;

BIASLOSS_TABLE_FOR_THIS_CPU(BatchNormTables, batch_norm_tables, batch_norm_tables)

}  // namespace biasloss
