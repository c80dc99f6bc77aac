#pragma once

#include <cstdint>

#include "../math/activations.h"
#include "types.h"

namespace biasloss {

// A map as the matrix `rows` by `width` (csrc/cpu/tiles.h), and h = act(scale * x + shift). Scale and shift have a
// value per column.
template <class T>
struct NormalizedMatrix {
  const T* x;
  int64_t rows, width;
  const AccumulatorOf<T>*scale, *shift;
  Activation activation;
};

}  // namespace biasloss
