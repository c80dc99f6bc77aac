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
  int64_t width;
  Scalar *pivot, *sum, *squares;

  template <class T>
  void first_pivot(const T* y, int64_t rows, int64_t y_stride) const {
    using Vector = typename Compute<T>::Vector;
    const int64_t some = rows < 8 ? rows : 8;
    for_vectors<Compute<T>::lanes>(width, [&](int64_t c, int64_t, auto count) {
      Vector total = {};
      for (int64_t row = 0; row < some; ++row) total += load_first(y + row * y_stride + c, count);
      store_first(pivot + c, total / (Vector{} + Scalar(some)), count);
    });
  }

  template <class T>
  void sum_rows(const T* y, int64_t rows, int64_t y_stride) const {
    using Vector = typename Compute<T>::Vector;
    for (int64_t i = 0; i < padded_columns<Scalar>(width); ++i) sum[i] = squares[i] = 0;
    for_rows(rows, [&](int64_t row, auto at_once) {
      for_vectors<Compute<T>::lanes>(width, [&](int64_t c, int64_t slot, auto count) {
        const Vector about = load_first(pivot + c, count);
        Vector total = {}, of_squares = {};  // sums of few, added to sums of many: short chains of roundings
        for (int r = 0; r < at_once; ++r) {
          const Vector v = load_first(y + (row + r) * y_stride + c, count) - about;
          total += v;
          of_squares += v * v;
        }
        store(sum + slot, load(sum + slot) + total);
        store(squares + slot, load(squares + slot) + of_squares);
      });
    });
    settle(sum, width);
    settle(squares, width);
  }

  // Merges a tile of `rows` into the `before` ones: Chan, Golub and LeVeque, as in csrc/math/moments.h.
  void merge_tile(int64_t before, int64_t rows, double* mean, double* m2) const {
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

// y = act(product + bias) + residual; the product may lie in y.
template <class T, class Scalar>
struct Finish {
  int64_t width;
  const Scalar* product;
  int64_t product_stride;
  const Scalar* bias;
  const T* residual;
  T* y;
  int64_t y_stride;
};

// A template, not a branch, for the residual: whether its addition fuses with a product must not depend on the columns.
template <Activation activation, bool has_residual, class T, class Scalar>
void finish_rows(const Finish<T, Scalar>& p, int64_t rows) {
  using Vector = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  for (int64_t row = 0; row < rows; ++row) {
    const Scalar* product = p.product + row * p.product_stride;
    // The last vector of a row overlaps the one before it, and must not read what that one has stored.
    const Vector last = p.width < lanes ? Vector{} : load(product + p.width - lanes);
    for_vectors<lanes>(p.width, [&](int64_t c, int64_t slot, auto count) {
      Vector v = c == slot ? load_first(product + c, count) : last;
      const int64_t at = row * p.y_stride + c;
      v = activate<activation>(p.bias == nullptr ? v : v + load_first(p.bias + c, count));
      if constexpr (has_residual) v += load_first(p.residual + at, count);
      store_first(p.y + at, v, count);
    });
  }
}

template <class T, class Scalar>
void finish_tile(const Finish<T, Scalar>& p, Activation output_activation, int64_t rows) {
  with_activation(output_activation, [&](auto constant) {
    constexpr Activation activation = decltype(constant)::value;
    if (p.residual != nullptr)
      finish_rows<activation, true>(p, rows);
    else
      finish_rows<activation, false>(p, rows);
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
  const ColumnMoments<Scalar> moments = {outputs, parts.take<Scalar>(outputs), parts.take<Scalar>(outputs),
                                         parts.take<Scalar>(outputs)};

  constexpr bool wide = sizeof(T) == sizeof(Scalar);
  constexpr int lanes = Compute<Scalar>::lanes;
  const bool x_as_it_is = wide && p.scale == nullptr && p.gate == nullptr;
  const bool into_y = wide && outputs >= Compute<T>::lanes;
  const bool finished =
      into_y && p.bias == nullptr && p.residual == nullptr && p.output_activation == Activation::identity;
  Finish<T, Scalar> finish = {
      .width = outputs,
      .product = product,
      .product_stride = product_stride,
      .bias = p.bias == nullptr ? nullptr : p.bias + first_output,
      .residual = nullptr,
      .y = nullptr,
      .y_stride = p.outputs,
  };
  const int64_t first_tile = piece * p.tiles.tiles_per_piece, first_row = p.tiles.begin(first_tile);
  for (int64_t tile = first_tile; tile < first_tile + p.tiles.tiles_per_piece; ++tile) {
    const int64_t begin = p.tiles.begin(tile), end = p.tiles.begin(tile + 1), rows = end - begin;
    if (rows == 0) continue;
    finish.y = static_cast<T*>(p.y) + begin * p.outputs + first_output;
    if (p.residual != nullptr) finish.residual = static_cast<const T*>(p.residual) + begin * p.outputs + first_output;
    const T* x = static_cast<const T*>(p.x) + begin * p.channels;
    const ProductSize size = {rows, outputs, p.channels};
    const Rows<const Scalar> weight = {
        p.weight + (p.by_vectors ? first_output / lanes * p.weight_stride : first_output), p.weight_stride};
    if (!x_as_it_is) load_tile<T>(p, begin, end, z, z_stride);
    const int64_t last = tile + 1 < first_tile + p.tiles.tiles_per_piece ? p.tiles.begin(tile + 2) : end;
    Fetch next(x + rows * p.channels, (last - end) * p.channels * int64_t(sizeof(T)),
               blocks_of<Scalar>(rows, outputs, p.channels));
    if constexpr (wide) {
      const Scalar* a = x_as_it_is ? x : z;
      const int64_t a_stride = x_as_it_is ? p.channels : z_stride;
      const Rows<Scalar> to = into_y ? Rows<Scalar>{finish.y, p.outputs} : Rows<Scalar>{product, product_stride};
      if (p.by_vectors)
        multiply_vectors<Scalar>(size, {a, a_stride}, weight, to, next);
      else if (into_y)
        multiply_exact<Scalar>(size, {a, a_stride}, weight, to, false, next);
      else
        multiply<Scalar>(size, {a, a_stride, 1}, weight, to, false, next);
      finish.product = to.data;
      finish.product_stride = to.stride;
    } else {
      multiply<Scalar>(size, {z, z_stride, 1}, weight, {product, product_stride}, false, next);
    }
    if (!finished) finish_tile(finish, p.output_activation, rows);
    if (!p.want_moments) continue;
    if (begin == first_row) moments.first_pivot(finish.y, rows, p.outputs);
    moments.sum_rows(finish.y, rows, p.outputs);
    moments.merge_tile(begin - first_row, rows, mean, m2);
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
