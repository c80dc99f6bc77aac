// The matrix products of the expansion and what feeds them, in each instruction set.
#pragma once

#include <cstdint>

#include "../math/matrix.h"
#include "../simd/isa.h"
#include "../simd/padding.h"
#include "../simd/per_element.h"

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
  // See multiply_vectors() there.
  void (*multiply_vectors)(ProductSize size, Rows<const Scalar> a, Rows<const Scalar> b, Rows<Scalar> c);
  void (*pack)(int64_t rows, int64_t columns, const Scalar* from, int64_t row_stride, int64_t column_stride, Scalar* to,
               int64_t to_stride);
  // to = x - mean, row by row, with zeros up to padded_columns(); mean null: x alone.
  void (*widen)(const T* x, int64_t rows, int64_t channels, const Scalar* mean, Scalar* to, int64_t to_stride);
  // to (+)= from, whose rows hold whole vectors: rows of fewer channels than a vector has lanes.
  void (*narrow)(const Scalar* from, int64_t from_stride, int64_t rows, int64_t channels, Scalar* to, bool accumulate);
};

template <class T>
using ExpansionKernelsOf = ExpansionKernels<T, AccumulatorOf<T>>;
using ExpansionTables = PerElement<ExpansionKernelsOf>;

BIASLOSS_TABLE_FOR_THIS_CPU(ExpansionTables, expansion_tables, expansion_tables)

}  // namespace biasloss
