// The products of the expansion over small matrices whose memory ends where it must.
#include <initializer_list>
#include <vector>

#include "../../csrc/depthwise/rows_simd.h"
#include "../../csrc/expand_depthwise/product_simd.h"
#include "cases.h"

namespace biasloss {
namespace {

template <class T, class Scalar>
void run_product(const ExpansionKernels<T, Scalar>& kernels, int64_t rows, int64_t columns, int64_t depth) {
  const int64_t of_x = padded_columns<Scalar>(depth), stride = buffer_stride<Scalar>(columns);
  const auto padded = [&](int64_t count) { return (count - 1) * stride + padded_columns<Scalar>(columns); };
  std::vector<T> x(rows * depth, T{});
  std::vector<Scalar> mean(depth), wide((rows - 1) * of_x + of_x), transposed(depth * rows), weight(columns * depth);
  std::vector<Scalar> packed(padded(depth)), sum(padded(rows));
  kernels.widen(x.data(), rows, depth, mean.data(), wide.data(), of_x);
  kernels.widen(x.data(), rows, depth, nullptr, wide.data(), of_x);
  kernels.pack(depth, columns, weight.data(), 1, depth, packed.data(), stride);
  Upcoming upcoming = {
      {reinterpret_cast<const char*>(x.data()), nullptr}, depth * int64_t(sizeof(T)), depth * int64_t(sizeof(T)), rows};
  const ProductSize size = {rows, columns, depth};
  kernels.multiply(size, {wide.data(), of_x, 1}, {packed.data(), stride}, {sum.data(), stride}, false, upcoming);
  std::vector<Scalar> exact(rows * columns), unpadded(depth * columns);
  for (const bool accumulate : {false, true})
    if (columns >= baseline::depthwise_tables.of(Scalar()).lanes)
      kernels.multiply_exact(size, {wide.data(), of_x}, {unpadded.data(), columns}, {exact.data(), columns},
                             accumulate);
  kernels.multiply(size, {transposed.data(), 1, rows}, {packed.data(), stride}, {sum.data(), stride}, true, upcoming);
}

}  // namespace

void run_expansion() {
  const ExpansionTables& tables = baseline::expansion_tables;
  for (const int64_t rows : {1, 5, 13, 56})
    for (const int64_t columns : {1, 5, 15, 16, 17, 72})
      for (const int64_t depth : {1, 3, 16, 40, 130}) {
        run_product(tables.float32, rows, columns, depth);
        run_product(tables.float64, rows, columns, depth);
        run_product(tables.float16, rows, columns, depth);
        run_product(tables.bfloat16, rows, columns, depth);
      }
}

}  // namespace biasloss
