// Tables of kernels for several types of elements, picked by a value of the type.
#pragma once

#include "types.h"

namespace biasloss {

template <template <class> class Table>
struct PerElement {
  Table<float> float32;
  Table<double> float64;
  Table<Float16> float16;
  Table<BFloat16> bfloat16;

  const auto& of(float) const { return float32; }
  const auto& of(double) const { return float64; }
  const auto& of(Float16) const { return float16; }
  const auto& of(BFloat16) const { return bfloat16; }
};

template <template <class> class Table>
struct PerScalar {
  Table<float> float32;
  Table<double> float64;

  const auto& of(float) const { return float32; }
  const auto& of(double) const { return float64; }
};

}  // namespace biasloss
