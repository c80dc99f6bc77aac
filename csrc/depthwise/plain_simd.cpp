#include "plain_simd.h"

#include "../simd/vector.h"
#include "tiles_simd.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// Which columns of a tile may lie outside of the map: none; those that only the taps reach; any.
enum class Outside { none, halo, any };

template <Outside kind>
struct Tile {
  static constexpr Outside outside = kind;
};

template <class Body>
inline void with_outside(bool all_inside, bool fits, const Body& body) {
  if (all_inside) return body(Tile<Outside::none>());
  fits ? body(Tile<Outside::halo>()) : body(Tile<Outside::any>());
}

// The value of a row at a column, for all lanes of a channel vector. `inside`: the column is known to be in the map.
template <bool inside, class Scalar>
inline VectorOf<Scalar> at(const Scalar* row, int64_t column, int64_t stride, int64_t width) {
  alignas(64) static constexpr Scalar zeros[Compute<Scalar>::lanes] = {};
  return load(inside || uint64_t(column) < uint64_t(width) ? row + column * stride : zeros);
}

// sum[t] = y at columns column + t. Every input column is loaded once and added to the outputs that it reaches.
template <int kernel, int stride, Outside outside, class Scalar>
inline void convolve_columns(const MapTaps<Scalar>& taps, int64_t channel, int64_t map_stride, const Scalar* weight,
                             int64_t column, VectorOf<Scalar> (&sum)[kTileColumns]) {
  constexpr int lanes = Compute<Scalar>::lanes, tile = kTileColumns, reach = (tile - 1) * stride + kernel;
  const int64_t first = column * stride - kernel / 2;
  for (auto& s : sum) s = VectorOf<Scalar>{};
  for (int64_t row = 0; row < taps.count; ++row) {
    const Scalar* in = taps.rows[row].data + channel;
    const Scalar* w = weight + taps.rows[row].index * kernel * lanes;
    VectorOf<Scalar> tap[kernel];
#pragma GCC unroll 8
    for (int j = 0; j < kernel; ++j) tap[j] = load(w + j * lanes);
#pragma GCC unroll 32
    for (int x = 0; x < reach; ++x) {
      const bool of_tile = x >= kernel / 2 && x <= kernel / 2 + (tile - 1) * stride;
      const VectorOf<Scalar> value = outside == Outside::none || (outside == Outside::halo && of_tile)
                                         ? at<true>(in, first + x, map_stride, taps.width)
                                         : at<false>(in, first + x, map_stride, taps.width);
#pragma GCC unroll 8
      for (int j = 0; j < kernel; ++j)
        if (x >= j && (x - j) % stride == 0 && (x - j) / stride < tile) sum[(x - j) / stride] += value * tap[j];
    }
  }
}

template <int kernel, int stride, class Scalar>
void convolve(const MapTaps<Scalar>& x, const Scalar* weight, RowSize size, MapRow<Scalar> y) {
  constexpr int lanes = Compute<Scalar>::lanes, tile = kTileColumns, reach = (tile - 1) * stride + kernel;
  const int64_t vectors = vectors_of(size.channels, lanes);
  for (int64_t column = 0; column < size.width; column += tile) {
    const int64_t first = column * stride - kernel / 2;
    with_outside(first >= 0 && first + reach <= x.width, column + tile <= size.width, [&](auto at_columns) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = first_channel(v, size.channels, lanes);
        VectorOf<Scalar> sum[tile];
        convolve_columns<kernel, stride, at_columns.outside>(x, c, y.stride, weight + v * kernel * kernel * lanes,
                                                             column, sum);
#pragma GCC unroll 8
        for (int t = 0; t < tile; ++t)
          if (at_columns.outside != Outside::any || column + t < size.width)
            store(y.data + (column + t) * y.stride + c, sum[t]);
      }
    });
  }
}

// Column `stride` * (group + t) + phase of x meets column group + t + (distance of tap j) of dy.
template <int kernel, int stride>
struct Meeting {
  static constexpr int padding = kernel / 2;
  static constexpr int tile = stride == 1 ? kTileColumns : kColumnPairs;
  static constexpr int first = -(padding / stride), last = tile - 1 + (padding + stride - 1) / stride;
  static constexpr int phase(int j) { return (padding + j) % stride; }
  static constexpr int distance(int j) { return (phase(j) + padding - j) / stride; }
};

// A tile of columns of x, one channel vector: every value of dy is loaded once, and serves both gradients.
template <int kernel, int stride, bool want_x, bool want_weight, Outside outside, class Scalar>
inline void gradient_columns(const MapTaps<Scalar>& taps, int64_t channel, int64_t map_stride, const Scalar* weight,
                             int64_t group, int64_t width, const PlainGradients<Scalar>& to, Scalar* grad_weight) {
  using Vector = VectorOf<Scalar>;
  using M = Meeting<kernel, stride>;
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t column = group * stride;
  Vector x[stride][M::tile], sum[stride][M::tile];
#pragma GCC unroll 16
  for (int t = 0; t < M::tile; ++t)
#pragma GCC unroll 2
    for (int phase = 0; phase < stride; ++phase) {
      if constexpr (want_weight)
        x[phase][t] = at<outside != Outside::any>(to.x + channel, column + t * stride + phase, map_stride, width);
      sum[phase][t] = Vector{};
    }
  for (int64_t row = 0; row < taps.count; ++row) {
    const Scalar* in = taps.rows[row].data + channel;
    const int64_t first_tap = taps.rows[row].index * kernel * lanes;
    Vector tap[kernel], of_weight[kernel];
#pragma GCC unroll 8
    for (int j = 0; j < kernel; ++j) tap[j] = load(weight + first_tap + j * lanes), of_weight[j] = Vector{};
#pragma GCC unroll 16
    for (int q = M::first; q <= M::last; ++q) {
      const bool inside = outside == Outside::none || (outside == Outside::halo && q >= 0 && q < M::tile);
      const Vector value =
          inside ? at<true>(in, group + q, map_stride, taps.width) : at<false>(in, group + q, map_stride, taps.width);
#pragma GCC unroll 8
      for (int j = 0; j < kernel; ++j) {
        const int t = q - M::distance(j);
        if (t < 0 || t >= M::tile) continue;
        if constexpr (want_x) sum[M::phase(j)][t] += value * tap[j];
        if constexpr (want_weight) of_weight[j] += value * x[M::phase(j)][t];
      }
    }
    if constexpr (want_weight) {
#pragma GCC unroll 8
      for (int j = 0; j < kernel; ++j) {
        Scalar* at_tap = grad_weight + first_tap + j * lanes;
        store(at_tap, load(at_tap) + of_weight[j]);
      }
    }
  }
  if constexpr (want_x) {
#pragma GCC unroll 16
    for (int t = 0; t < M::tile; ++t)
#pragma GCC unroll 2
      for (int phase = 0; phase < stride; ++phase) {
        const int64_t q = column + t * stride + phase;
        if (outside != Outside::any || q < width) store(to.grad_x + q * map_stride + channel, sum[phase][t]);
      }
  }
}

template <int kernel, int stride, bool want_x, bool want_weight, class Scalar>
void gradients_of_row(const MapTaps<Scalar>& dy, const Scalar* weight, RowSize size, int64_t map_stride,
                      const PlainGradients<Scalar>& to) {
  using M = Meeting<kernel, stride>;
  constexpr int lanes = Compute<Scalar>::lanes, taps = kernel * kernel * lanes;
  const int64_t vectors = vectors_of(size.channels, lanes);
  for (int64_t group = 0; group * stride < size.width; group += M::tile) {
    const bool fits = (group + M::tile) * stride <= size.width;
    with_outside(fits && group + M::first >= 0 && group + M::last < dy.width, fits, [&](auto at_columns) {
      for (int64_t v = 0; v < vectors; ++v)
        gradient_columns<kernel, stride, want_x, want_weight, at_columns.outside>(
            dy, first_channel(v, size.channels, lanes), map_stride, weight + v * taps, group, size.width, to,
            want_weight ? to.grad_weight + v * taps : nullptr);
    });
  }
}

template <int kernel, int stride, class Scalar>
void gradients(const MapTaps<Scalar>& dy, const Scalar* weight, RowSize size, int64_t map_stride,
               const PlainGradients<Scalar>& to) {
  if (to.grad_weight == nullptr)
    gradients_of_row<kernel, stride, true, false>(dy, weight, size, map_stride, to);
  else if (to.grad_x == nullptr)
    gradients_of_row<kernel, stride, false, true>(dy, weight, size, map_stride, to);
  else
    gradients_of_row<kernel, stride, true, true>(dy, weight, size, map_stride, to);
}

template <class Scalar>
constexpr PlainKernels<Scalar> kernels = {
    {{convolve<3, 1, Scalar>, convolve<3, 2, Scalar>},
     {convolve<5, 1, Scalar>, convolve<5, 2, Scalar>},
     {convolve<7, 1, Scalar>, convolve<7, 2, Scalar>}},
    {{gradients<3, 1, Scalar>, gradients<3, 2, Scalar>},
     {gradients<5, 1, Scalar>, gradients<5, 2, Scalar>},
     {gradients<7, 1, Scalar>, gradients<7, 2, Scalar>}},
};

}  // namespace

extern const PlainTables plain_tables;
const PlainTables plain_tables = {kernels<float>, kernels<double>};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
