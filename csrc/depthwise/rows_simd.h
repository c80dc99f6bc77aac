// One row of a depthwise convolution at a time, in each instruction set. A row in cache ("strip") lies channel vector
// by channel vector, [vectors][columns][lanes], with zeros on either side, so that no inner loop knows of edges. Vector
// v of `channels` channels starts at channel v * lanes, the last one so that it ends with the last channel: it overlaps
// the one before it and needs no tail. Only where there are fewer channels than lanes is a vector part empty.
#pragma once

#include <cstdint>

#include "../math/macros.h"
#include "../simd/isa.h"
#include "../simd/types.h"

namespace biasloss {

// Output columns that a convolution keeps in registers; map widths of mobile networks are multiples of 7.
constexpr int64_t kTileColumns = 7;

// A row of a map in memory, channels_last: value of channel c in column q at data[q * stride + c].
template <class T>
struct MapRow {
  T* data;
  int64_t stride;
};

// A strip behind its left padding.
template <class Scalar>
struct Strip {
  Scalar* data;
  int64_t columns;  // from one vector to the next, padding included
};

struct RowSize {
  int64_t width, channels;
};

// Columns of a strip of a row of `width`, whose kernel has k columns, padding and what the last tile overhangs
// included.
BIASLOSS_HOST_DEVICE int64_t strip_columns(int64_t width, int64_t kernel) {
  return (width + kTileColumns - 1) / kTileColumns * kTileColumns + kTileColumns + 2 * kernel;
}

BIASLOSS_HOST_DEVICE int64_t vectors_of(int64_t channels, int64_t lanes) {
  return channels <= lanes ? 1 : (channels + lanes - 1) / lanes;
}

BIASLOSS_HOST_DEVICE int64_t first_channel(int64_t vector, int64_t channels, int64_t lanes) {
  const int64_t first = vector * lanes, last = channels > lanes ? channels - lanes : 0;
  return first < last ? first : last;
}

// A batch normalization, where scale is not null, and an activation on load.
template <class Scalar>
struct Affine {
  const Scalar* scale;
  const Scalar* shift;
  int activation;

  BIASLOSS_HOST_DEVICE Affine at(int64_t channel) const {
    return scale == nullptr ? *this : Affine{scale + channel, shift + channel, activation};
  }
};

// What makes dy from the gradient at act(affine(y)); y null: dy is grad itself.
template <class T, class Scalar>
struct OutputGradient {
  MapRow<const T> grad;  // data may be null: zeros
  MapRow<const T> y;
  const Scalar* pool_grad;  // of this sample; may be null
  Scalar pool_scale;
  Affine<Scalar> affine;
  const Scalar* coefficients[4];  // a, b, c, center
};

// Where du goes, and what is summed of it.
template <class T, class Scalar>
struct InputGradient {
  MapRow<const T> x;
  MapRow<T> grad_x;  // data may be null
  Affine<Scalar> affine;
  const Scalar* center;           // null: no sums
  Scalar* sums;                   // [vectors][2][lanes], added to
  MapRow<const T> residual_grad;  // added to what is stored, behind the derivative; data may be null
  int64_t skipped;                // of what the taps yield, columns that lie before the row; at stride 2 alone
};

// Strips, each to be multiplied with the kernel's row `index`. Rows outside of the map are not listed.
template <class Scalar>
struct Taps {
  struct {
    const Scalar* data;  // behind the left padding
    int64_t index;
  } rows[7];
  int64_t count;
  int64_t columns;

  void add(Strip<Scalar> strip, int64_t index) {
    rows[count++] = {strip.data, index};
    columns = strip.columns;
  }
};

// Running moments of every channel, [vectors][3][lanes]: shift, mean - shift, m2; and how many columns they hold.
template <class Scalar>
struct RunningMoments {
  Scalar* values;  // null: not wanted
  int64_t count;
};

template <class T, class Scalar>
struct DepthwiseKernels {
  int64_t lanes;
  // strip = act(affine(x))
  void (*activate)(MapRow<const T> x, RowSize size, Affine<Scalar> affine, Strip<Scalar> strip);
  // strip = dy
  void (*output_gradient)(const OutputGradient<T, Scalar>& from, RowSize size, Strip<Scalar> strip);
  // A row of y, [kernel is 3, 5, 7][stride is 1, 2]. The weights are packed.
  void (*convolve[3][2])(Taps<Scalar> taps, const Scalar* weight, RowSize size, MapRow<T> y,
                         RunningMoments<Scalar> moments);
  // A row of du; taps are rows of dy. At stride 1 the weights are packed with the kernel turned round. `workspace`
  // holds strip_columns() vectors, of the width and what is skipped.
  void (*input_gradient[3][2])(Taps<Scalar> taps, const Scalar* weight, RowSize size,
                               const InputGradient<T, Scalar>& to, Scalar* workspace);
  // Adds the products of a row of dy with rows of h to grad_weight, which is packed. The width is that of dy.
  void (*weight_gradient[3][2])(Strip<Scalar> dy, Taps<Scalar> taps, RowSize size, Scalar* grad_weight);
  // Per-channel values between [vectors][rows][lanes] and from[channel * channel_stride + row * row_stride].
  void (*pack)(const Scalar* from, int64_t channel_stride, int64_t row_stride, int64_t channels, int64_t rows,
               Scalar* packed);
  void (*unpack)(const Scalar* packed, int64_t channels, int64_t rows, Scalar* to, int64_t channel_stride,
                 int64_t row_stride);
};

struct DepthwiseTables {
  DepthwiseKernels<float, float> float32;
  DepthwiseKernels<double, double> float64;
  DepthwiseKernels<Float16, float> float16;
  DepthwiseKernels<BFloat16, float> bfloat16;

  const DepthwiseKernels<float, float>& of(float) const { return float32; }
  const DepthwiseKernels<double, double>& of(double) const { return float64; }
  const DepthwiseKernels<Float16, float>& of(Float16) const { return float16; }
  const DepthwiseKernels<BFloat16, float>& of(BFloat16) const { return bfloat16; }
};

BIASLOSS_TABLE_FOR_THIS_CPU(DepthwiseTables, depthwise_tables, depthwise_tables)

}  // namespace biasloss
