// Sums of h = act(scale * x + shift) over the rows of a matrix of columns (csrc/cpu/tiles.h), in each instruction set.
// Per-column values have `width` elements, accumulators `width + lanes`.
#pragma once

#include <cstdint>

#include "../math/activations.h"
#include "../simd/isa.h"
#include "../simd/types.h"

namespace biasloss {

template <class T>
struct PoolTable {
  using Scalar = AccumulatorOf<T>;

  struct Matrix {
    const T* x;
    int64_t rows, width;
    const Scalar *scale, *shift;
    Activation activation;
  };

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

struct PoolTables {
  PoolTable<float> float32;
  PoolTable<double> float64;
  PoolTable<Float16> float16;
  PoolTable<BFloat16> bfloat16;

  const auto& of(float) const { return float32; }
  const auto& of(double) const { return float64; }
  const auto& of(Float16) const { return float16; }
  const auto& of(BFloat16) const { return bfloat16; }
};

BIASLOSS_TABLE_FOR_THIS_CPU(PoolTables, pool_tables, pool_tables)

}  // namespace biasloss
