// The matrix products of the expansion and what feeds them, in each instruction set.
#pragma once

#include <cstdint>

#include "../math/matrix.h"
#include "../simd/isa.h"
#include "../simd/padding.h"
#include "../simd/types.h"

namespace biasloss {

// Runs of memory, two at every step, that are fetched into the cache while a product keeps the arithmetic units busy.
struct Upcoming {
  const char* runs[2];  // may be null
  int64_t bytes, stride, count;
};

template <class T, class Scalar>
struct ExpansionKernels {
  // See csrc/simd/gemm.h. What has been fetched is taken out of `upcoming`.
  void (*multiply)(ProductSize size, Strided<Scalar> a, Rows<const Scalar> b, Rows<Scalar> c, bool accumulate,
                   Upcoming& upcoming);
  void (*multiply_exact)(ProductSize size, Rows<const Scalar> a, Rows<const Scalar> b, Rows<Scalar> c, bool accumulate);
  void (*pack)(int64_t rows, int64_t columns, const Scalar* from, int64_t row_stride, int64_t column_stride, Scalar* to,
               int64_t to_stride);
  // to = x - mean, row by row, with zeros up to padded_columns(); mean null: x alone.
  void (*widen)(const T* x, int64_t rows, int64_t channels, const Scalar* mean, Scalar* to, int64_t to_stride);
};

struct ExpansionTables {
  ExpansionKernels<float, float> float32;
  ExpansionKernels<double, double> float64;
  ExpansionKernels<Float16, float> float16;
  ExpansionKernels<BFloat16, float> bfloat16;

  const ExpansionKernels<float, float>& of(float) const { return float32; }
  const ExpansionKernels<double, double>& of(double) const { return float64; }
  const ExpansionKernels<Float16, float>& of(Float16) const { return float16; }
  const ExpansionKernels<BFloat16, float>& of(BFloat16) const { return bfloat16; }
};

BIASLOSS_TABLE_FOR_THIS_CPU(ExpansionTables, expansion_tables, expansion_tables)

}  // namespace biasloss
