// Batch normalization and pooling on matrices of columns whose memory ends where it must.
#include <initializer_list>
#include <vector>

#include "../../csrc/batch_norm/batch_norm_simd.h"
#include "../../csrc/pool_variance/pool_variance_simd.h"
#include "cases.h"

namespace biasloss {
namespace {

template <class T>
struct Columns {
  using Scalar = AccumulatorOf<T>;

  Columns(int64_t rows, int64_t width, int64_t lanes)
      : rows(rows),
        width(width),
        x(rows * width),
        out(x),
        row(width, Scalar(1)),
        pivot(width + lanes),
        sum(width + lanes),
        squares(width + lanes),
        total(width) {}

  int64_t rows, width;
  std::vector<T> x, out;
  std::vector<Scalar> row, pivot, sum, squares;
  std::vector<double> total;
};

template <class T>
void run_batch_norm(const BatchNormTable<T>& table, int64_t rows, int64_t width, Activation activation) {
  Columns<T> c(rows, width, table.lanes);
  const auto* row = c.row.data();
  table.moments(c.x.data(), rows, width, c.pivot.data(), c.sum.data(), c.squares.data());
  table.add_totals(rows, c.pivot.data(), c.sum.data(), width, c.total.data());
  table.add_deviations(rows, c.pivot.data(), c.sum.data(), c.squares.data(), c.total.data(), width, c.total.data());
  const typename BatchNormTable<T>::Matrix matrix = {c.x.data(), rows, width, row, row, activation};
  const std::vector<T> other(c.x.size());
  table.apply(matrix, nullptr, c.out.data());
  table.apply(matrix, other.data(), c.out.data());
  table.sums(matrix, other.data(), row, c.sum.data(), c.squares.data());
  table.add_sums(c.sum.data(), width, c.total.data());
  table.backward(matrix, other.data(), {row, row, row, row}, c.out.data());
}

template <class T>
void run_pool(const PoolTable<T>& table, int64_t rows, int64_t width, Activation activation) {
  Columns<T> c(rows, width, table.lanes);
  const auto* row = c.row.data();
  const typename PoolTable<T>::Matrix matrix = {c.x.data(), rows, width, row, row, activation};
  table.sums(matrix, c.pivot.data(), c.sum.data());
  table.moments(matrix, c.pivot.data(), c.sum.data(), c.squares.data());
  table.add_totals(rows, c.pivot.data(), c.sum.data(), width, c.total.data());
  table.add_deviations(rows, c.pivot.data(), c.sum.data(), c.squares.data(), c.total.data(), width, c.total.data());
  table.backward(matrix, row, row, c.sum.data(), c.squares.data(), c.out.data());
  table.settle(c.sum.data(), width);
  table.add_sums(c.sum.data(), width, c.total.data());
}

template <class T>
void run_both(int64_t lanes, int64_t rows, Activation activation) {
  for (const int64_t width : {lanes, lanes + 1, 3 * lanes - 1}) {
    run_batch_norm(baseline::batch_norm_tables.of(T()), rows, width, activation);
    run_pool(baseline::pool_tables.of(T()), rows, width, activation);
  }
}

}  // namespace

void run_columns() {
  for (const int64_t rows : {1, 3, 4, 37})
    for (const Activation activation :
         {Activation::identity, Activation::relu, Activation::relu6, Activation::hardswish, Activation::silu}) {
      run_both<float>(baseline::batch_norm_tables.float32.lanes, rows, activation);
      run_both<double>(baseline::batch_norm_tables.float64.lanes, rows, activation);
      run_both<Float16>(baseline::batch_norm_tables.float16.lanes, rows, activation);
      run_both<BFloat16>(baseline::batch_norm_tables.bfloat16.lanes, rows, activation);
    }
}

}  // namespace biasloss
