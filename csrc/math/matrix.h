// Matrices in memory that somebody else owns, and what a product of two of them is called with. No torch.
#pragma once

#include <cstdint>

namespace biasloss {

// Row-major: element (i, j) is data[i * stride + j].
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

// Element (i, j) is data[i * row_stride + j * column_stride]. Strides can be constants of the compiler.
template <class T, class RowStride = int64_t, class ColumnStride = int64_t>
struct Strided {
  const T* data;
  RowStride row_stride;
  ColumnStride column_stride;
};

// Of C = A B: C is rows x columns, A rows x depth.
struct ProductSize {
  int64_t rows, columns, depth;
};

}  // namespace biasloss
