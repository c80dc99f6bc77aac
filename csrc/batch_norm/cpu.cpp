#include <memory>
#include <vector>

#include "../cpu/activation.h"
#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../cpu/tiles.h"
#include "batch_norm_simd.h"
#include "finish.h"
#include "ops.h"

namespace biasloss {
namespace {

void check_same(const Tensor& other, const Tensor& y, const char* name) {
  map_shape(other, name);
  bool same = other.scalar_type() == y.scalar_type();
  for (int d = 0; d < 4; ++d) same = same && other.size(d) == y.size(d);
  STD_TORCH_CHECK(same, name, ": expected the shape and dtype of y");
}

// The last, incomplete row of a map, filled up with zeros to a whole one.
template <class T>
std::vector<T> filled_up(const T* map, const Tiles& tiles) {
  std::vector<T> row(tiles.width);
  if (map != nullptr) std::copy_n(map + tiles.rows * tiles.width, tiles.tail, row.data());
  return row;
}

// Sums over the rows of a matrix, chunk by chunk: `kinds` sums a column, each with its accumulators.
template <class Scalar>
class ColumnSums {
 public:
  ColumnSums(const Tiles& tiles, int64_t lanes, int64_t kinds)
      : tiles_(tiles),
        chunks_(tiles.rows),
        stride_(tiles.width + lanes),
        kinds_(kinds),
        partial_(new Scalar[(chunks_.count + 1) * kinds * stride_]) {}

  // Calls sum(first_row, rows, accumulators) for every chunk; a chunk of its own for the incomplete row.
  template <class Sum>
  void compute(int64_t elements, const Sum& sum) {
    parallel_shares(elements, [&](int64_t share, int64_t shares) {
      for (int64_t i = chunks_.count * share / shares; i < chunks_.count * (share + 1) / shares; ++i)
        sum(chunks_.begin(i), chunks_.begin(i + 1) - chunks_.begin(i), [&](int64_t kind) { return at(i, kind); });
    });
  }

  // Calls add(rows, width, accumulators) for every chunk in order.
  template <class Add>
  void combine(const Add& add) const {
    for (int64_t i = 0; i < chunks_.count; ++i)
      add(chunks_.begin(i + 1) - chunks_.begin(i), tiles_.width, [&](int64_t kind) { return at(i, kind); });
    if (tiles_.tail > 0) add(1, tiles_.tail, [&](int64_t kind) { return at(chunks_.count, kind); });
  }

  Scalar* of_tail(int64_t kind) { return at(chunks_.count, kind); }

 private:
  Scalar* at(int64_t chunk, int64_t kind) const { return partial_.get() + (chunk * kinds_ + kind) * stride_; }

  Tiles tiles_;
  Chunks chunks_;
  int64_t stride_, kinds_;
  std::unique_ptr<Scalar[]> partial_;
};

template <class T>
using Scalar = AccumulatorOf<T>;

// Mean and biased variance, (2, C).
template <class T>
void moments(const Tensor& y, const MapShape& s, const BatchNormTable<T>& table, Scalar<T>* out) {
  const T* data = static_cast<const T*>(y.const_data_ptr());
  std::fill_n(out, 2 * s.channels, Scalar<T>(0));
  if (y.numel() == 0) return;

  const Tiles tiles(s.channels, s.rows(), table.lanes);
  ColumnSums<Scalar<T>> sums(tiles, table.lanes, 3);
  sums.compute(y.numel(), [&](int64_t row, int64_t rows, const auto& to) {
    table.moments(data + row * tiles.width, rows, tiles.width, to(0), to(1), to(2));
  });
  if (tiles.tail > 0)
    table.moments(filled_up(data, tiles).data(), 1, tiles.width, sums.of_tail(0), sums.of_tail(1), sums.of_tail(2));

  std::vector<double> mean(tiles.width), deviations(tiles.width);
  sums.combine(
      [&](int64_t rows, int64_t width, const auto& of) { table.add_totals(rows, of(0), of(1), width, mean.data()); });
  fold(mean, s.channels);
  for (int64_t c = 0; c < s.channels; ++c) mean[c] /= static_cast<double>(s.rows());
  for (int64_t j = s.channels; j < tiles.width; ++j) mean[j] = mean[j - s.channels];
  sums.combine([&](int64_t rows, int64_t width, const auto& of) {
    table.add_deviations(rows, of(0), of(1), of(2), mean.data(), width, deviations.data());
  });
  fold(deviations, s.channels);
  for (int64_t c = 0; c < s.channels; ++c) {
    out[c] = static_cast<Scalar<T>>(mean[c]);
    // A NaN must survive.
    out[s.channels + c] = static_cast<Scalar<T>>(deviations[c] < 0 ? 0 : deviations[c] / double(s.rows()));
  }
}

// A map and its affine as the SIMD kernels see them, split into shares of rows.
template <class T>
struct Normalized {
  Normalized(const Tensor& y, const Tensor& affine, Activation activation, const BatchNormTable<T>& table)
      : shape(map_shape(y, "batch_norm: y")),
        tiles(shape.channels, shape.rows(), table.lanes),
        data(static_cast<const T*>(y.const_data_ptr())),
        activation(activation) {
    const auto* rows = values_of<Scalar<T>>(affine, 2 * shape.channels, "batch_norm: affine");
    scale = repeated(rows, tiles);
    shift = repeated(rows + shape.channels, tiles);
  }

  NormalizedMatrix<T> matrix(const T* from, int64_t rows) const {
    return {from, rows, tiles.width, scale.data(), shift.data(), activation};
  }
  auto rows_from(int64_t row, int64_t rows) const { return matrix(data + row * tiles.width, rows); }

  // Writes out, row by row: kernel(matrix, other, out), where `other` is a second map read along with y, or null.
  template <class Kernel>
  void map(const T* other, T* out, const Kernel& kernel) const {
    const int64_t streams = other == nullptr ? 2 : 3;
    parallel_shares(shape.rows() * shape.channels * streams, [&](int64_t share, int64_t shares) {
      const int64_t begin = tiles.rows * share / shares, end = tiles.rows * (share + 1) / shares;
      const int64_t start = begin * tiles.width;
      kernel(rows_from(begin, end - begin), other == nullptr ? nullptr : other + start, out + start);
    });
    if (tiles.tail == 0) return;
    const std::vector<T> y = filled_up(data, tiles), second = filled_up(other, tiles);
    std::vector<T> row(tiles.width);
    kernel(matrix(y.data(), 1), other == nullptr ? nullptr : second.data(), row.data());
    std::copy_n(row.data(), tiles.tail, out + tiles.rows * tiles.width);
  }

  MapShape shape;
  Tiles tiles;
  const T* data;
  Activation activation;
  std::vector<Scalar<T>> scale, shift;
};

// sum(du) and sum(du * (y - center)), (2, C).
template <class T>
void sums(const Normalized<T>& y, const T* grad, const Scalar<T>* center, const BatchNormTable<T>& table,
          Scalar<T>* out) {
  const Tiles& tiles = y.tiles;
  const std::vector<Scalar<T>> centers = repeated(center, tiles);
  ColumnSums<Scalar<T>> partial(tiles, table.lanes, 2);
  partial.compute(2 * y.shape.rows() * y.shape.channels, [&](int64_t row, int64_t rows, const auto& to) {
    table.sums(y.rows_from(row, rows), grad + row * tiles.width, centers.data(), to(0), to(1));
  });
  if (tiles.tail > 0)
    table.sums(y.matrix(filled_up(y.data, tiles).data(), 1), filled_up(grad, tiles).data(), centers.data(),
               partial.of_tail(0), partial.of_tail(1));
  for (int kind = 0; kind < 2; ++kind) {
    std::vector<double> total(tiles.width);
    partial.combine([&](int64_t, int64_t width, const auto& of) { table.add_sums(of(kind), width, total.data()); });
    fold(total, y.shape.channels);
    std::copy_n(total.data(), y.shape.channels, out + kind * y.shape.channels);
  }
}

}  // namespace

Tensor batch_norm_statistics_cpu(Tensor y, OptionalTensor norm_weight, OptionalTensor norm_bias,
                                 OptionalTensor running_mean, OptionalTensor running_var,
                                 OptionalTensor num_batches_tracked, double momentum, double eps) {
  const MapShape s = map_shape(y, "batch_norm_statistics: y");
  Tensor statistics = empty_tensor({4, s.channels}, accumulation_dtype(y.scalar_type()));
  with_element(y.scalar_type(), [&](auto element, auto accumulator) {
    moments(y, s, batch_norm_tables().of(element), static_cast<decltype(accumulator)*>(statistics.mutable_data_ptr()));
  });
  finish_statistics(statistics, s.rows(),
                    {norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, momentum, eps});
  return statistics;
}

Tensor batch_norm_affine_cpu(Tensor moments, int64_t count, OptionalTensor norm_weight, OptionalTensor norm_bias,
                             OptionalTensor running_mean, OptionalTensor running_var,
                             OptionalTensor num_batches_tracked, double momentum, double eps) {
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == 2, "batch_norm_affine: moments: expected shape (2, C)");
  STD_TORCH_CHECK(moments.scalar_type() == ScalarType::Float || moments.scalar_type() == ScalarType::Double,
                  "batch_norm_affine: moments: expected float32 or float64");
  STD_TORCH_CHECK(count >= 0, "batch_norm_affine: count: expected at least 0, got ", count);
  Tensor statistics = empty_tensor({4, moments.size(1)}, moments.scalar_type());
  const auto copy = [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t values = moments.numel();
    std::copy_n(values_of<T>(moments, values, "batch_norm_affine: moments"), values,
                static_cast<T*>(statistics.mutable_data_ptr()));
  };
  moments.scalar_type() == ScalarType::Double ? copy(double()) : copy(float());
  finish_statistics(statistics, count,
                    {norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, momentum, eps});
  return statistics;
}

Tensor batch_norm_apply_cpu(Tensor y, Tensor affine, int64_t activation, OptionalTensor residual) {
  const Activation function = checked_activation(activation, "batch_norm_apply: activation");
  if (residual.has_value()) check_same(*residual, y, "batch_norm_apply: residual");
  return with_element(y.scalar_type(), [&](auto element, auto) {
    using T = decltype(element);
    const auto& table = batch_norm_tables().of(element);
    const Normalized<T> map(y, affine, function, table);
    Tensor out = empty_map(map.shape, y.scalar_type());
    const T* other = residual.has_value() ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    map.map(other, static_cast<T*>(out.mutable_data_ptr()), table.apply);
    return out;
  });
}

Tensor batch_norm_coefficients_cpu(Tensor grad, Tensor y, Tensor affine, Tensor moments, int64_t activation, double eps,
                                   bool frozen) {
  const Activation function = checked_activation(activation, "batch_norm_coefficients: activation");
  check_same(grad, y, "batch_norm_coefficients: grad");
  const MapShape shape = map_shape(y, "batch_norm_coefficients: y");
  Tensor coefficients = empty_tensor({6, shape.channels}, accumulation_dtype(y.scalar_type()));
  with_element(y.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Sum = decltype(accumulator);
    const auto& table = batch_norm_tables().of(element);
    const Normalized<T> map(y, affine, function, table);
    const auto* mean = values_of<Sum>(moments, 2 * shape.channels, "batch_norm_coefficients: moments");
    sums(map, static_cast<const T*>(grad.const_data_ptr()), mean, table, row_of<Sum>(coefficients, 4));
  });
  finish_coefficients(coefficients, shape.rows(), {affine, moments, eps, frozen});
  return coefficients;
}

Tensor batch_norm_backward_cpu(Tensor grad, Tensor y, Tensor affine, Tensor coefficients, int64_t activation) {
  const Activation function = checked_activation(activation, "batch_norm_backward: activation");
  check_same(grad, y, "batch_norm_backward: grad");
  return with_element(y.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    const auto& table = batch_norm_tables().of(element);
    const Normalized<T> map(y, affine, function, table);
    const int64_t channels = map.shape.channels;
    const auto* k = values_of<decltype(accumulator)>(coefficients, 6 * channels, "batch_norm_backward: coefficients");
    const auto a = repeated(k, map.tiles), b = repeated(k + channels, map.tiles),
               c = repeated(k + 2 * channels, map.tiles), center = repeated(k + 3 * channels, map.tiles);
    Tensor dy = empty_map(map.shape, y.scalar_type());
    map.map(static_cast<const T*>(grad.const_data_ptr()), static_cast<T*>(dy.mutable_data_ptr()),
            [&](const auto& matrix, const T* du, T* out) {
              table.backward(matrix, du, {a.data(), b.data(), c.data(), center.data()}, out);
            });
    return dy;
  });
}

}  // namespace biasloss
