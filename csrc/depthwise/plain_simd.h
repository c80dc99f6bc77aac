// The plain depthwise convolution (no normalisation, no activation, no moments) of maps of float32 or float64, read and
// written where they lie: nothing is copied, every map is passed over once. For at least `lanes` channels.
#pragma once

#include "rows_simd.h"

namespace biasloss {

// Rows of a map, each to be multiplied with the kernel's row `index`. Rows outside of the map are not listed.
template <class Scalar>
struct MapTaps {
  struct {
    const Scalar* data;
    int64_t index;
  } rows[7];
  int64_t count;
  int64_t width;

  void add(const Scalar* data, int64_t index) { rows[count++] = {data, index}; }
};

// From one row of x and the rows of dy that it contributes to.
template <class Scalar>
struct PlainGradients {
  const Scalar* x;
  Scalar* grad_x;       // a row; null: not wanted
  Scalar* grad_weight;  // packed, added to; null: not wanted
};

// The weights are packed; columns of a row lie `stride` values apart.
template <class Scalar>
struct PlainKernels {
  // A row of y, [kernel is 3, 5, 7][stride is 1, 2].
  void (*convolve[3][2])(const MapTaps<Scalar>& x, const Scalar* weight, RowSize size, MapRow<Scalar> y);
  void (*gradients[3][2])(const MapTaps<Scalar>& dy, const Scalar* weight, RowSize size, int64_t stride,
                          const PlainGradients<Scalar>& to);
};

struct PlainTables {
  PlainKernels<float> float32;
  PlainKernels<double> float64;

  const PlainKernels<float>& of(float) const { return float32; }
  const PlainKernels<double>& of(double) const { return float64; }
};

namespace baseline {
extern const PlainTables plain_tables;
}
namespace avx2 {
extern const PlainTables plain_tables;
}
namespace avx512 {
extern const PlainTables plain_tables;
}

inline const PlainTables& plain_tables() {
#if defined(BIASLOSS_X86_VARIANTS)
  return for_this_cpu(baseline::plain_tables, avx2::plain_tables, avx512::plain_tables);
#else
  return baseline::plain_tables;
#endif
}

}  // namespace biasloss
