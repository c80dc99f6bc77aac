// The kernels of Bias Loss over runs whose memory ends where it must.
#include <initializer_list>
#include <vector>

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
