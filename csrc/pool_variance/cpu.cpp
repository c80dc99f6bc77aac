#include <limits>
#include <memory>
#include <vector>

#include "../batch_norm/finish.h"
#include "../cpu/activation.h"
#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../cpu/tiles.h"
#include "../math/moments.h"
#include "ops.h"
#include "pool_variance_simd.h"

namespace biasloss {
namespace {

template <class T>
using Scalar = AccumulatorOf<T>;

// A map whose samples are matrices of columns, and u = scale * x + shift.
template <class T>
struct Samples {
  Samples(const Tensor& x, const OptionalTensor& affine, Activation activation, const PoolTable<T>& table)
      : shape(map_shape(x, "pool_variance: x")),
        tiles(shape.channels, shape.positions(), table.lanes),
        size(shape.channels * shape.positions()),
        data(static_cast<const T*>(x.const_data_ptr())),
        activation(activation) {
    const auto* rows = values_of<Scalar<T>>(affine, 2 * shape.channels, "pool_variance: affine");
    scale = repeated(rows, tiles, Scalar<T>(1));
    shift = repeated(rows == nullptr ? nullptr : rows + shape.channels, tiles);
  }

  NormalizedMatrix<T> matrix(const T* from, int64_t rows) const {
    return {from, rows, tiles.width, scale.data(), shift.data(), activation};
  }
  int64_t offset(int64_t sample, int64_t row) const { return sample * size + row * tiles.width; }

  // The last, incomplete row of a sample, filled up with zeros to a whole one.
  std::vector<T> tail_of(int64_t sample) const {
    std::vector<T> row(tiles.width);
    std::copy_n(data + offset(sample, tiles.rows), tiles.tail, row.data());
    return row;
  }

  MapShape shape;
  Tiles tiles;
  int64_t size;
  const T* data;
  Activation activation;
  std::vector<Scalar<T>> scale, shift;
};

// Column sums of every sample, in fixed pieces: whole rows, and one more for the incomplete row.
template <class T>
class Pool {
 public:
  Pool(const Samples<T>& x, const PoolTable<T>& table, Scalar<T>* pooled, Scalar<T>* variance)
      : x_(x),
        table_(table),
        chunks_(x.tiles.rows),
        pieces_(chunks_.count + (x.tiles.tail > 0 ? 1 : 0)),
        stride_(x.tiles.width + table.lanes),
        partial_(new Scalar<T>[x.shape.samples * pieces_ * 3 * stride_]),
        pooled_(pooled),
        variance_(variance) {}

  void compute() {
    const int64_t tasks = x_.shape.samples * pieces_;
    std::vector<char> finished(x_.shape.samples);
    parallel_shares(x_.shape.rows() * x_.shape.channels, [&](int64_t share, int64_t shares) {
      const int64_t begin = tasks * share / shares, end = tasks * (share + 1) / shares;
      for (int64_t task = begin; task < end; ++task) {
        sum_up(task / pieces_, task % pieces_);
        const int64_t sample = task / pieces_;
        if (task % pieces_ != pieces_ - 1 || sample * pieces_ < begin) continue;
        finish(sample);
        finished[sample] = 1;
      }
    });
    for (int64_t sample = 0; sample < x_.shape.samples; ++sample)  // those cut by the end of a share
      if (finished[sample] == 0) finish(sample);
  }

 private:
  struct Piece {
    int64_t rows, width;
    Scalar<T>*pivot, *sum, *squares;
  };

  Piece piece(int64_t sample, int64_t i) const {
    Scalar<T>* at = partial_.get() + (sample * pieces_ + i) * 3 * stride_;
    if (i == chunks_.count) return {1, x_.tiles.tail, at, at + stride_, at + 2 * stride_};
    return {chunks_.begin(i + 1) - chunks_.begin(i), x_.tiles.width, at, at + stride_, at + 2 * stride_};
  }

  void sum_up(int64_t sample, int64_t i) const {
    const Piece p = piece(sample, i);
    const auto sum = [&](const T* from) {
      if (variance_ == nullptr) return table_.sums(x_.matrix(from, p.rows), p.pivot, p.sum);
      table_.moments(x_.matrix(from, p.rows), p.pivot, p.sum, p.squares);
    };
    if (i < chunks_.count)
      sum(x_.data + x_.offset(sample, chunks_.begin(i)));
    else
      sum(x_.tail_of(sample).data());
  }

  void finish(int64_t sample) const {
    const int64_t channels = x_.shape.channels, positions = x_.shape.positions();
    std::vector<double> total(x_.tiles.width);
    for (int64_t i = 0; i < pieces_; ++i) {
      const Piece p = piece(sample, i);
      table_.add_totals(p.rows, p.pivot, p.sum, p.width, total.data());
    }
    fold(total, channels);
    double all = 0;
    for (int64_t c = 0; c < channels; ++c) {
      all += total[c];
      pooled_[sample * channels + c] = static_cast<Scalar<T>>(total[c] / static_cast<double>(positions));
    }
    if (variance_ == nullptr) return;
    const auto count = static_cast<double>(channels * positions);
    const std::vector<double> mean(x_.tiles.width, all / count);
    std::vector<double> deviations(x_.tiles.width);
    for (int64_t i = 0; i < pieces_; ++i) {
      const Piece p = piece(sample, i);
      table_.add_deviations(p.rows, p.pivot, p.sum, p.squares, mean.data(), p.width, deviations.data());
    }
    double m2 = 0;
    for (const double d : deviations) m2 += d;
    // A NaN must survive.
    variance_[sample] = static_cast<Scalar<T>>(unbiased_variance(Moments<double>{count, mean[0], m2 < 0 ? 0.0 : m2}));
  }

  const Samples<T>& x_;
  const PoolTable<T>& table_;
  Chunks chunks_;
  int64_t pieces_, stride_;
  std::unique_ptr<Scalar<T>[]> partial_;
  Scalar<T>*pooled_, *variance_;
};

// The rows of all samples one behind the other, a sample's incomplete row last, cut into fixed chunks that may begin
// and end within a sample.
template <class T>
class Backward {
 public:
  Backward(const Samples<T>& x, const PoolTable<T>& table, const Scalar<T>* pool_grad, const Scalar<T>* center, T* out)
      : x_(x),
        table_(table),
        pool_grad_(pool_grad),
        center_(repeated(center, x.tiles)),
        out_(out),
        rows_of_sample_(x.tiles.rows + (x.tiles.tail > 0 ? 1 : 0)),
        chunks_(x.shape.samples * rows_of_sample_),
        stride_(x.tiles.width + table.lanes),
        partial_(chunks_.count * 2 * stride_) {}

  void compute() {
    parallel_shares(2 * x_.shape.rows() * x_.shape.channels, [&](int64_t share, int64_t shares) {
      for (int64_t i = chunks_.count * share / shares; i < chunks_.count * (share + 1) / shares; ++i) {
        for (int64_t row = chunks_.begin(i); row < chunks_.begin(i + 1);) {
          const int64_t sample = row / rows_of_sample_, first = row % rows_of_sample_;
          const int64_t rows = std::min(rows_of_sample_ - first, chunks_.begin(i + 1) - row);
          run(sample, first, rows, sum(i), sum(i) + stride_);
          row += rows;
        }
        table_.settle(sum(i), x_.tiles.width);
        table_.settle(sum(i) + stride_, x_.tiles.width);
      }
    });
  }

  // (2, C): sum(du) and sum(du * (x - center)).
  void sums_into(Scalar<T>* out) {
    for (int kind = 0; kind < 2; ++kind) {
      std::vector<double> total(x_.tiles.width);
      for (int64_t i = 0; i < chunks_.count; ++i)
        table_.add_sums(sum(i) + kind * stride_, x_.tiles.width, total.data());
      fold(total, x_.shape.channels);
      std::copy_n(total.data(), x_.shape.channels, out + kind * x_.shape.channels);
    }
  }

 private:
  Scalar<T>* sum(int64_t chunk) { return partial_.data() + chunk * 2 * stride_; }

  void run(int64_t sample, int64_t first, int64_t rows, Scalar<T>* sum, Scalar<T>* centered) const {
    const Tiles& tiles = x_.tiles;
    std::vector<Scalar<T>> grad = repeated(pool_grad_ + sample * tiles.channels, tiles);
    for (Scalar<T>& g : grad) g /= static_cast<Scalar<T>>(x_.shape.positions());
    const int64_t whole = std::min(first + rows, tiles.rows) - first, at = x_.offset(sample, first);
    table_.backward(x_.matrix(x_.data + at, whole), grad.data(), center_.data(), sum, centered, out_ + at);
    if (whole == rows) return;
    std::fill(grad.begin() + tiles.tail, grad.end(), Scalar<T>(0));  // what fills the row up adds nothing
    const std::vector<T> tail = x_.tail_of(sample);
    std::vector<T> du(tiles.width);
    table_.backward(x_.matrix(tail.data(), 1), grad.data(), center_.data(), sum, centered, du.data());
    std::copy_n(du.data(), tiles.tail, out_ + x_.offset(sample, tiles.rows));
  }

  const Samples<T>& x_;
  const PoolTable<T>& table_;
  const Scalar<T>* pool_grad_;
  std::vector<Scalar<T>> center_;
  T* out_;
  int64_t rows_of_sample_;
  Chunks chunks_;
  int64_t stride_;
  std::vector<Scalar<T>> partial_;
};

}  // namespace

std::tuple<Tensor, Tensor> pool_variance_cpu(Tensor x, OptionalTensor affine, int64_t activation, bool want_variance) {
  const Activation function = checked_activation(activation, "pool_variance: activation");
  return with_element(x.scalar_type(), [&](auto element, auto accumulator) -> std::tuple<Tensor, Tensor> {
    using Sum = decltype(accumulator);
    const auto& table = pool_tables().of(element);
    const Samples<decltype(element)> samples(x, affine, function, table);
    const ScalarType dtype = accumulation_dtype(x.scalar_type());
    Tensor pooled = empty_tensor({samples.shape.samples, samples.shape.channels}, dtype);
    Tensor variance = empty_tensor({want_variance ? samples.shape.samples : 0}, dtype);
    auto* means = static_cast<Sum*>(pooled.mutable_data_ptr());
    auto* variances = want_variance ? static_cast<Sum*>(variance.mutable_data_ptr()) : nullptr;
    if (x.numel() == 0) {  // means of nothing
      std::fill_n(means, pooled.numel(), std::numeric_limits<Sum>::quiet_NaN());
      std::fill_n(variances, variance.numel(), std::numeric_limits<Sum>::quiet_NaN());
    } else {
      Pool(samples, table, means, variances).compute();
    }
    return {pooled, variance};
  });
}

std::tuple<Tensor, Tensor> pool_variance_backward_cpu(Tensor pool_grad, Tensor x, OptionalTensor affine,
                                                      OptionalTensor moments, int64_t activation, double eps,
                                                      bool frozen) {
  const Activation function = checked_activation(activation, "pool_variance_backward: activation");
  STD_TORCH_CHECK(affine.has_value() || !moments.has_value(), "pool_variance_backward: moments need affine, got none");
  return with_element(x.scalar_type(), [&](auto element, auto accumulator) -> std::tuple<Tensor, Tensor> {
    using T = decltype(element);
    using Sum = decltype(accumulator);
    const auto& table = pool_tables().of(element);
    const Samples<T> samples(x, affine, function, table);
    const MapShape& shape = samples.shape;
    const auto* grad = values_of<Sum>(pool_grad, shape.samples * shape.channels, "pool_variance_backward: pool_grad");
    const auto* mean = values_of<Sum>(moments, 2 * shape.channels, "pool_variance_backward: moments");
    Tensor du = empty_map(shape, x.scalar_type());
    Backward<T> backward(samples, table, grad, mean, static_cast<T*>(du.mutable_data_ptr()));
    if (x.numel() > 0) backward.compute();
    if (mean == nullptr) return {du, empty_tensor({0}, dtype_of<Sum>)};
    Tensor coefficients = empty_tensor({6, shape.channels}, dtype_of<Sum>);
    backward.sums_into(row_of<Sum>(coefficients, 4));
    finish_coefficients(coefficients, shape.rows(), {*affine, *moments, eps, frozen});
    return {du, coefficients};
  });
}

}  // namespace biasloss
