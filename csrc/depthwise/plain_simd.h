// The plain depthwise convolution (no normalization, no activation, no moments) of maps of float32 or float64, read and
// written where they lie: nothing is copied, every map is passed over once. For at least `lanes` channels.
//
// A band of rows lies in the second cache. It is worked on channel vector by channel vector, down its rows, so that the
// rows which the kernel spans stay in the first.
#pragma once

#include "rows_simd.h"

namespace biasloss {

// Rows of one sample, and a block of its channels. Columns lie `distance` values apart.
struct Band {
  int64_t height, width;          // of x
  int64_t out_height, out_width;  // of y
  int64_t channels, distance;
  int64_t row_shift, column_shift;  // see window_shift.h
  int64_t begin, end;               // the rows: of y for convolve, of x for gradients
};

// Memory that is fetched while a band is worked on: what the next one reads and writes.
struct NextBand {
  struct Stream {
    const char *begin, *end;
  } streams[3];
};

// Maps are given by the first value of the block in the sample.
template <class Scalar>
struct PlainGradients {
  const Scalar *dy, *x;
  Scalar* grad_x;       // null: not wanted
  Scalar* grad_weight;  // packed, added to; null: not wanted
};

// The weights are packed. [kernel is 3, 5, 7][stride is 1, 2]
template <class Scalar>
struct PlainKernels {
  void (*convolve[3][2])(const Scalar* x, const Scalar* weight, const Band& band, Scalar* y, const NextBand& next);
  void (*gradients[3][2])(const PlainGradients<Scalar>& maps, const Scalar* weight, const Band& band,
                          const NextBand& next);
};

struct PlainTables {
  PlainKernels<float> float32;
  PlainKernels<double> float64;

  const PlainKernels<float>& of(float) const { return float32; }
  const PlainKernels<double>& of(double) const { return float64; }
};

BIASLOSS_TABLE_FOR_THIS_CPU(PlainTables, plain_tables, plain_tables)

}  // namespace biasloss
