// Rows of matrices in whole cache lines, which are whole vectors of every instruction set.
#pragma once

#include <cstdint>

#include "../math/macros.h"

namespace biasloss {

constexpr int64_t kLineBytes = 64;

template <class Scalar>
BIASLOSS_HOST_DEVICE int64_t padded_columns(int64_t columns) {
  constexpr int64_t line = kLineBytes / sizeof(Scalar);
  return (columns + line - 1) / line * line;
}

// The distance of rows that suits a buffer: an odd number of lines, so that rows do not share the same cache sets.
template <class Scalar>
BIASLOSS_HOST_DEVICE int64_t buffer_stride(int64_t columns) {
  constexpr int64_t line = kLineBytes / sizeof(Scalar);
  return padded_columns<Scalar>(columns) / line % 2 == 1 ? padded_columns<Scalar>(columns)
                                                         : padded_columns<Scalar>(columns) + line;
}

}  // namespace biasloss
