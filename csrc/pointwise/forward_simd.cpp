#include "../simd/isa.h"
#include "pointwise_simd.h"
#include "rows.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// The moments of a piece's columns, tile by tile. A tile is summed about the mean of all before it, the first about
// the mean of its first rows: near enough that no digits cancel, wherever the outliers lie.
template <class Scalar>
struct ColumnMoments {
  static constexpr int64_t first_rows = 8;
  Scalar *pivot, *sum, *squares;
  int64_t width;

  void clear() const {
    for (int64_t i = 0; i < accumulator_stride<Scalar>(width); ++i) sum[i] = squares[i] = 0;
  }

  void settle_sums() const {
    settle(sum, width);
    settle(squares, width);
  }

  void first_pivot(int64_t rows) const {
    settle(sum, width);
    for (int64_t c = 0; c < width; ++c) pivot[c] = sum[c] / Scalar(rows);
  }

  // Merges a tile of `rows` into the `before` ones: Chan, Golub and LeVeque, as in csrc/math/moments.h.
  void merge_tile(int64_t before, int64_t rows, double* mean, double* m2) const {
    settle_sums();
    const double count = double(rows), fraction = count / double(before + rows);
    for (int64_t c = 0; c < width; ++c) {
      const double of_pivot = double(sum[c]) / count;
      const double m2_of_tile = double(squares[c]) - double(sum[c]) * of_pivot;
      const double delta = double(pivot[c]) + of_pivot - (before == 0 ? 0.0 : mean[c]);
      mean[c] = (before == 0 ? 0.0 : mean[c]) + delta * fraction;
      m2[c] = (before == 0 ? 0.0 : m2[c] + delta * delta * (double(before) * fraction)) +
              (m2_of_tile < 0 ? 0.0 : m2_of_tile);
      pivot[c] = Scalar(mean[c]);
    }
  }
};

// y = act(product + bias) + residual, and its sums about the pivot where moments are wanted. `done`: the product lies
// in y already, and nothing is left to be applied.
// A template, not a branch, for the residual: whether its addition fuses with a product must not depend on the columns.
template <Activation activation, bool want_moments, bool has_residual, class T, class Scalar>
void finish_rows(int64_t rows, int64_t width, const Scalar* product, int64_t product_stride, const Scalar* bias,
                 const T* residual, T* y, int64_t y_stride, bool done, const ColumnMoments<Scalar>& moments) {
  using Vector = typename Compute<T>::Vector;
  if (done && !want_moments) return;
  for_rows(rows, [&](int64_t row, auto at_once) {
    for_vectors<Compute<T>::lanes>(width, [&](int64_t c, int64_t slot, auto count) {
      Vector sum = {}, squares = {}, pivot = {};
      if constexpr (want_moments) pivot = load_first(moments.pivot + c, count);
      const Vector added = bias == nullptr ? Vector{} : load_first(bias + c, count);
      for (int r = 0; r < at_once; ++r) {
        const int64_t at = (row + r) * y_stride + c;
        Vector v = load_first(product + (row + r) * product_stride + c, count);
        if (!done) {
          v = activate<activation>(v + added);
          if constexpr (has_residual) v += load_first(residual + at, count);
          store_first(y + at, v, count);
          if constexpr (sizeof(T) < sizeof(Scalar)) v = load_first(y + at, count);
        }
        if constexpr (want_moments) {
          v -= pivot;
          sum += v;
          squares += v * v;
        }
      }
      if constexpr (want_moments) {
        store(moments.sum + slot, load(moments.sum + slot) + sum);
        store(moments.squares + slot, load(moments.squares + slot) + squares);
      }
    });
  });
}

// Rows of a piece for `outputs` columns from first_output on.
template <class T, class Scalar = typename Compute<T>::Scalar>
void forward_piece(const PointwiseForward<Scalar>& p, int64_t piece, int64_t first_output, int64_t outputs,
                   void* scratch, double* mean, double* m2) {
  const int64_t z_stride = buffer_stride<Scalar>(p.channels), product_stride = buffer_stride<Scalar>(outputs);
  Parts parts(scratch);
  auto* z = parts.take<Scalar>(p.tiles.largest() * z_stride);
  auto* product = parts.take<Scalar>(p.tiles.largest() * product_stride);
  ColumnMoments<Scalar> moments;
  moments.pivot = parts.take<Scalar>(outputs);
  moments.sum = parts.take<Scalar>(outputs);
  moments.squares = parts.take<Scalar>(outputs);
  moments.width = outputs;

  constexpr bool wide = sizeof(T) == sizeof(Scalar);
  const bool x_as_it_is = wide && p.scale == nullptr && p.gate == nullptr;
  const bool y_as_it_is = wide && outputs % Compute<T>::lanes == 0 && p.bias == nullptr && p.residual == nullptr &&
                          p.output_activation == Activation::identity;
  const Scalar* bias = p.bias == nullptr ? nullptr : p.bias + first_output;
  const int64_t first_tile = piece * p.tiles.tiles_per_piece, first_row = p.tiles.begin(first_tile);
  for (int64_t tile = first_tile; tile < first_tile + p.tiles.tiles_per_piece; ++tile) {
    const int64_t begin = p.tiles.begin(tile), end = p.tiles.begin(tile + 1), rows = end - begin;
    if (rows == 0) continue;
    T* y = static_cast<T*>(p.y) + begin * p.outputs + first_output;
    const T* residual = static_cast<const T*>(p.residual);
    if (residual != nullptr) residual += begin * p.outputs + first_output;
    const Scalar* a = z;
    int64_t a_stride = z_stride;
    Scalar* c = product;
    int64_t c_stride = product_stride;
    if constexpr (wide) {
      if (x_as_it_is) a = static_cast<const T*>(p.x) + begin * p.channels, a_stride = p.channels;
      if (y_as_it_is) c = y, c_stride = p.outputs;
    }
    if (!x_as_it_is) load_tile<T>(p, begin, end, z, z_stride);
    multiply<Scalar>(rows, outputs, p.channels, a, a_stride, 1, p.weight + first_output, p.weight_stride, c, c_stride,
                     false);
    with_activation(p.output_activation, [&](auto constant) {
      constexpr Activation activation = decltype(constant)::value;
      const auto finish = [&](int64_t count) {
        if (p.want_moments && residual != nullptr)
          finish_rows<activation, true, true>(count, outputs, c, c_stride, bias, residual, y, p.outputs, false,
                                              moments);
        else if (p.want_moments)
          finish_rows<activation, true, false>(count, outputs, c, c_stride, bias, residual, y, p.outputs, y_as_it_is,
                                               moments);
        else if (residual != nullptr)
          finish_rows<activation, false, true>(count, outputs, c, c_stride, bias, residual, y, p.outputs, false,
                                               moments);
        else
          finish_rows<activation, false, false>(count, outputs, c, c_stride, bias, residual, y, p.outputs, y_as_it_is,
                                                moments);
      };
      if (!p.want_moments) return finish(rows);
      if (begin == first_row) {
        const int64_t some = rows < moments.first_rows ? rows : moments.first_rows;
        for (int64_t i = 0; i < outputs; ++i) moments.pivot[i] = 0;
        moments.clear();
        finish(some);
        moments.first_pivot(some);
      }
      moments.clear();
      finish(rows);
      moments.merge_tile(begin - first_row, rows, mean, m2);
    });
  }
}

int64_t scratch_bytes(const RowTiles& tiles, int64_t channels, int64_t outputs, int64_t scalar_bytes) {
  const int64_t lines = 2 * kLineBytes / scalar_bytes;  // a row's padding
  return (tiles.largest() * (channels + outputs + 2 * lines) + 3 * (outputs + lines)) * scalar_bytes;
}

}  // namespace

extern const PointwiseForwardTable pointwise_forward;
const PointwiseForwardTable pointwise_forward = {
    BIASLOSS_VECTOR_BYTES,
    {pack<float>, pack<double>},
    scratch_bytes,
    {forward_piece<float>, forward_piece<double>, forward_piece<Float16>, forward_piece<BFloat16>},
};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
