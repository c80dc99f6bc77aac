// The kernels of Bias Loss over runs whose memory ends where it must.
#include <initializer_list>
#include <vector>

#include "../../csrc/bias_loss/lanes_simd.h"
#include "../../csrc/bias_loss/rows_simd.h"
#include "../../csrc/feature_variance/moments_simd.h"
#include "../../csrc/simd/types.h"
#include "cases.h"

namespace biasloss {
namespace {

template <class Scalar>
void run_scores(const RowTable<Scalar>& table, int64_t classes) {
  const std::vector<Scalar> x(classes), q(classes, Scalar(1) / Scalar(classes));
  std::vector<Scalar> gradient(classes);
  Scalar max = 0, log_sum = 0;
  table.max_and_log_sum(x.data(), classes, &max, &log_sum);
  const Scalar loss = table.soft_loss(x.data(), q.data(), classes, max, log_sum);
  table.hard_gradient(x.data(), classes, max, log_sum, loss, gradient.data());
  table.soft_gradient(x.data(), q.data(), classes, max, log_sum, loss, Scalar(1), gradient.data());
}

// The scores of rows that lie side by side (row_stride 1) or one behind the other, in memory that ends with the last.
template <class T, class Scalar, class Load, class Store>
void run_lanes(const LaneTable<Scalar>& table, Load load, Store store, int64_t rows, int64_t classes,
               bool side_by_side) {
  constexpr int64_t width = 64;
  const RowBlock block = side_by_side ? RowBlock{rows, classes, 1, rows + 3} : RowBlock{rows, classes, classes, 1};
  std::vector<T> memory((rows - 1) * block.row_stride + (classes - 1) * block.class_stride + 1);
  std::vector<Scalar> x(classes * width), q(classes * width), spare(classes * width);
  LaneRows<Scalar> of = {};
  for (int64_t r = 0; r < width; ++r) of.label[r] = r < rows && r % 3 > 0 ? int32_t(r % classes) : -1;
  load(memory.data(), block, x.data(), width, spare.data());
  table.max_and_log_sum(x.data(), classes, width, rows, &of);
  table.hard_loss(x.data(), classes, width, rows, &of);
  table.soft_loss(x.data(), q.data(), classes, width, rows, &of);
  table.soft_gradient(x.data(), q.data(), classes, width, of, rows);
  table.hard_gradient(x.data(), classes, width, of, rows);
  store(x.data(), width, block, memory.data(), spare.data());
  std::vector<Scalar> weight(rows);
  table.weigh(weight.data(), rows, Scalar(0), Scalar(1), Scalar(0.3), Scalar(0.3));
}

// Elements lie `stride` apart, but for the last: memory ends with it.
template <class Half, class Widen, class Narrow>
void run_conversions(Widen widen, Narrow narrow, int64_t count, int64_t stride) {
  std::vector<Half> half((count - 1) * stride + 1);
  std::vector<float> wide(count);
  widen(half.data(), stride, count, wide.data());
  narrow(wide.data(), count, half.data(), stride);
}

}  // namespace

void run_rows() {
  const RowTables& tables = baseline::row_tables;
  const LaneTables& lanes = baseline::lane_tables;
  for (const int64_t rows : {1, 3, 4, 5, 16, 63, 64})
    for (const int64_t classes : {1, 2, 3, 4, 5, 21, 64})
      for (const bool side_by_side : {false, true}) {
        run_lanes<float>(lanes.float32, lanes.float32.load, lanes.float32.store, rows, classes, side_by_side);
        run_lanes<double>(lanes.float64, lanes.float64.load, lanes.float64.store, rows, classes, side_by_side);
        run_lanes<Float16>(lanes.float32, lanes.load_float16, lanes.store_float16, rows, classes, side_by_side);
        run_lanes<BFloat16>(lanes.float32, lanes.load_bfloat16, lanes.store_bfloat16, rows, classes, side_by_side);
      }
  const MomentsTable& moments = baseline::moments_table;
  for (const int64_t count : {1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 100, 1000}) {
    run_scores(tables.float32, count);
    run_scores(tables.float64, count);
    for (const int64_t stride : {1, 3}) {
      run_conversions<Float16>(tables.widen_float16, tables.narrow_float16, count, stride);
      run_conversions<BFloat16>(tables.widen_bfloat16, tables.narrow_bfloat16, count, stride);
    }
    moments.of_float32(std::vector<float>(count).data(), count);
    moments.of_float64(std::vector<double>(count).data(), count);
    moments.of_float16(std::vector<Float16>(count).data(), count);
    moments.of_bfloat16(std::vector<BFloat16>(count).data(), count);
  }
}

}  // namespace biasloss
