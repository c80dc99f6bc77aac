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

// In float64 every column is checked: that costs little beside its arithmetic, and leaves two of three versions to
// compile for float32 alone.
template <class Scalar, bool with_halo = true, class Body>
inline void with_outside(bool all_inside, bool fits, const Body& body) {
  if constexpr (sizeof(Scalar) == 8) return body(Tile<Outside::any>());
  if (all_inside) return body(Tile<Outside::none>());
  if constexpr (with_halo)
    fits ? body(Tile<Outside::halo>()) : body(Tile<Outside::any>());
  else
    body(Tile<Outside::any>());
}

constexpr int64_t kStripTiles = 4;

// The value of a row at a column, for all lanes of a channel vector. `inside`: the column is known to be in the map, of
// which the first column is number `first`.
template <bool inside, class Scalar>
inline VectorOf<Scalar> at(const Scalar* row, int64_t column, int64_t stride, int64_t width, int64_t first = 0) {
  alignas(64) static constexpr Scalar zeros[Compute<Scalar>::lanes] = {};
  return load(inside || uint64_t(column - first) < uint64_t(width) ? row + column * stride : zeros);
}

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

// Fetches what comes next in equal steps: all at once would keep what is needed now waiting.
class Fetching {
 public:
  Fetching(const NextBand& next, int64_t steps) {
    for (int i = 0; i < kStreams; ++i) {
      at_[i] = next.streams[i].begin;
      const int64_t lines = (next.streams[i].end - next.streams[i].begin + kLine - 1) / kLine;
      lines_[i] = steps == 0 ? 0 : (lines + steps - 1) / steps;
    }
  }
  void step() {
    for (int i = 0; i < kStreams; ++i)
      for (int64_t line = 0; line < lines_[i]; ++line, at_[i] += kLine) __builtin_prefetch(at_[i], 0, 2);
  }

 private:
  static constexpr int kStreams = 3;
  static constexpr int64_t kLine = 64;
  const char* at_[kStreams];
  int64_t lines_[kStreams];
};

struct Columns {
  int64_t begin, end;
};

inline int64_t steps_of(const Band& band, int64_t tiles, int64_t lanes) {
  return vectors_of(band.channels, lanes) * (band.end - band.begin) * tiles;
}

// Calls body(vector, first channel, row, columns) for all of a band, a strip of columns and a channel vector down its
// rows at a time. Columns of power-of-two numbers of channels share few sets of the first cache: strips are so narrow
// that the rows which the kernel spans stay in them.
template <int tile, int stride, int lanes, class Body>
inline void for_each_strip(const Band& band, int64_t width, const Body& body) {
  const int64_t vectors = vectors_of(band.channels, lanes);
  const int64_t strip = vectors == 1 ? width : tile * (kStripTiles / stride);  // one vector's columns lie in all sets
  for (int64_t begin = 0; begin < width; begin += strip) {
    const int64_t end = begin + strip < width ? begin + strip : width;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t channel = first_channel(v, band.channels, lanes);
      for (int64_t row = band.begin; row < band.end; ++row) body(v, channel, row, Columns{begin, end});
    }
  }
}

// sum[t] = y at columns column + t, of which the windows begin at columns first + t * stride of x.
template <int kernel, int stride, Outside outside, class Scalar>
inline void convolve_columns(const MapTaps<Scalar>& taps, int64_t distance, const Scalar* weight, int64_t first,
                             VectorOf<Scalar> (&sum)[kTileColumns]) {
  for (auto& s : sum) s = VectorOf<Scalar>{};
  for (int64_t row = 0; row < taps.count; ++row) {
    const Scalar* in = taps.rows[row].data;
    const auto value = [&](int x) __attribute__((always_inline)) {
      const bool of_tile = x >= kernel / 2 && x <= kernel / 2 + (kTileColumns - 1) * stride;
      return outside == Outside::none || (outside == Outside::halo && of_tile)
                 ? at<true>(in, first + x, distance, taps.width)
                 : at<false>(in, first + x, distance, taps.width);
    };
    add_row<kernel, stride>(weight + taps.rows[row].index * kernel * Compute<Scalar>::lanes, value, sum);
  }
}

// Where windows begin that belong to row or column `output`.
template <int kernel, int stride>
inline int64_t first_input(int64_t output, int64_t shift) {
  return output * stride - kernel / 2 + (stride == 1 ? 0 : shift);
}

template <int kernel, int stride, class Scalar>
MapTaps<Scalar> input_rows(const Scalar* x, const Band& band, int64_t row) {
  MapTaps<Scalar> taps;
  taps.count = 0;
  taps.width = band.width;
  const int64_t first = first_input<kernel, stride>(row, band.row_shift);
  for (int64_t i = 0; i < kernel; ++i)
    if (first + i >= 0 && first + i < band.height) taps.add(x + (first + i) * band.width * band.distance, i);
  return taps;
}

template <int kernel, int stride, class Scalar>
void convolve(const Scalar* x, const Scalar* weight, const Band& band, Scalar* y, const NextBand& next) {
  constexpr int lanes = Compute<Scalar>::lanes, tile = kTileColumns, reach = (tile - 1) * stride + kernel;
  const int64_t width = band.out_width;
  Fetching fetching(next, steps_of(band, (width + tile - 1) / tile, lanes));
  for_each_strip<tile, stride, lanes>(band, width, [&](int64_t v, int64_t channel, int64_t row, Columns columns) {
    const Scalar* w = weight + v * kernel * kernel * lanes;
    const auto taps = input_rows<kernel, stride>(x + channel, band, row);
    Scalar* to = y + row * width * band.distance + channel;
    for (int64_t column = columns.begin; column < columns.end; column += tile) {
      const int64_t first = first_input<kernel, stride>(column, band.column_shift);
      fetching.step();
      with_outside<Scalar>(first >= 0 && first + reach <= band.width, column + tile <= width, [&](auto at_columns) {
        VectorOf<Scalar> sum[tile];
        convolve_columns<kernel, stride, at_columns.outside>(taps, band.distance, w, first, sum);
#pragma GCC unroll 8
        for (int t = 0; t < tile; ++t)
          if (at_columns.outside != Outside::any || column + t < width)
            store(to + (column + t) * band.distance, sum[t]);
      });
    }
  });
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGradientColumns = 7, kGradientPairs = 4;
#else  // half as many registers
constexpr int kGradientColumns = 4, kGradientPairs = 2;
#endif

// Column `stride` * (group + t) + phase of x meets column group + t + (distance of tap j) of dy. Where windows are
// shifted by 1, the columns of both maps are numbered from 1 on: it is the same ones that meet.
template <int kernel, int stride>
struct Meeting {
  static constexpr int padding = kernel / 2;
  static constexpr int tile = stride == 1 ? kGradientColumns : kGradientPairs;
  static constexpr int first = -(padding / stride), last = tile - 1 + (padding + stride - 1) / stride;
  static constexpr int phase(int j) { return (padding + j) % stride; }
  static constexpr int distance(int j) { return (phase(j) + padding - j) / stride; }
};

// A row of the maps of PlainGradients, given by their columns 0.
template <class Scalar>
struct GradientRow {
  MapTaps<Scalar> dy;
  const Scalar* x;
  Scalar* grad_x;
};

// A tile of columns of x, one channel vector: every value of dy is loaded once, and serves both gradients.
template <int kernel, int stride, int shift, bool want_x, bool want_weight, Outside outside, class Scalar>
inline void gradient_columns(const GradientRow<Scalar>& row, int64_t distance, const Scalar* weight, int64_t group,
                             int64_t width, Scalar* grad_weight) {
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
        x[phase][t] = at<outside != Outside::any>(row.x, column + t * stride + phase, distance, width, shift);
      sum[phase][t] = Vector{};
    }
  for (int64_t i = 0; i < row.dy.count; ++i) {
    const Scalar* in = row.dy.rows[i].data;
    const int64_t first_tap = row.dy.rows[i].index * kernel * lanes;
    Vector tap[kernel], of_weight[kernel];
#pragma GCC unroll 8
    for (int j = 0; j < kernel; ++j) tap[j] = load(weight + first_tap + j * lanes), of_weight[j] = Vector{};
#pragma GCC unroll 16
    for (int q = M::first; q <= M::last; ++q) {
      const bool inside = outside == Outside::none || (outside == Outside::halo && q >= 0 && q < M::tile);
      const Vector value = inside ? at<true>(in, group + q, distance, row.dy.width)
                                  : at<false>(in, group + q, distance, row.dy.width, shift);
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
        const bool begun = shift == 0 || t > 0 || phase > 0 || q >= shift;
        if (outside != Outside::any || (begun && q < width + shift)) store(row.grad_x + q * distance, sum[phase][t]);
      }
  }
}

// Inlined, so that the loops over its rows know how many there can be.
template <int kernel, int stride, class Scalar>
inline __attribute__((always_inline)) GradientRow<Scalar> gradient_row(const PlainGradients<Scalar>& maps,
                                                                       const Band& band, int64_t row, int64_t channel,
                                                                       int64_t shift) {
  GradientRow<Scalar> of_row;
  channel -= shift * band.distance;
  const int64_t offset = row * band.width * band.distance + channel;
  of_row.x = maps.x + offset;
  of_row.grad_x = maps.grad_x == nullptr ? nullptr : maps.grad_x + offset;
  of_row.dy.count = 0;
  of_row.dy.width = band.out_width;
  for (int64_t i = kernel - 1; i >= 0; --i) {  // in order of their place in memory
    const int64_t from = row - first_input<kernel, stride>(0, band.row_shift) - i;
    if (from >= 0 && from % stride == 0 && from / stride < band.out_height)
      of_row.dy.add(maps.dy + from / stride * band.out_width * band.distance + channel, i);
  }
  return of_row;
}

template <int kernel, int stride, int shift, bool want_x, bool want_weight, class Scalar>
void gradients_of_band(const PlainGradients<Scalar>& maps, const Scalar* weight, const Band& band,
                       const NextBand& next) {
  using M = Meeting<kernel, stride>;
  constexpr int lanes = Compute<Scalar>::lanes, taps = kernel * kernel * lanes;
  const int64_t width = band.width, groups = (width + stride - 1) / stride + shift;
  Fetching fetching(next, steps_of(band, (groups + M::tile - 1) / M::tile, lanes));
  for_each_strip<M::tile, stride, lanes>(band, groups, [&](int64_t v, int64_t channel, int64_t row, Columns columns) {
    const auto of_row = gradient_row<kernel, stride>(maps, band, row, channel, shift);
    for (int64_t group = columns.begin; group < columns.end; group += M::tile) {
      const bool fits = (group + M::tile) * stride <= width + shift;
      fetching.step();
      with_outside<Scalar, shift == 0>(
          fits && group + M::first >= shift && group + M::last < band.out_width + shift, fits, [&](auto at_columns) {
            gradient_columns<kernel, stride, shift, want_x, want_weight, at_columns.outside>(
                of_row, band.distance, weight + v * taps, group, width,
                want_weight ? maps.grad_weight + v * taps : nullptr);
          });
    }
  });
}

template <int kernel, int stride, int shift, class Scalar>
void wanted_gradients(const PlainGradients<Scalar>& maps, const Scalar* weight, const Band& band,
                      const NextBand& next) {
  if (maps.grad_weight == nullptr)
    gradients_of_band<kernel, stride, shift, true, false>(maps, weight, band, next);
  else if (maps.grad_x == nullptr)
    gradients_of_band<kernel, stride, shift, false, true>(maps, weight, band, next);
  else
    gradients_of_band<kernel, stride, shift, true, true>(maps, weight, band, next);
}

// Compiled apart with shifted columns, but for tiles that are partly outside: what else decides about a tile would cost
// as much as a few of its columns.
template <int kernel, int stride, class Scalar>
void gradients(const PlainGradients<Scalar>& maps, const Scalar* weight, const Band& band, const NextBand& next) {
  if constexpr (stride > 1)
    if (band.column_shift > 0) return wanted_gradients<kernel, stride, 1>(maps, weight, band, next);
  wanted_gradients<kernel, stride, 0>(maps, weight, band, next);
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
