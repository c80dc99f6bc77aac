#include "rows_simd.h"

#include <math.h>

#include "../simd/vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

template <class Scalar>
inline Scalar exponential_of_one(Scalar x) {
  return exponential(typename Compute<Scalar>::Vector{} + x)[0];
}

template <class Scalar>
Scalar maximum_of_row(const Scalar* x, int64_t classes) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  Scalar largest = -static_cast<Scalar>(INFINITY);
  int64_t k = 0;
  if (classes >= 2 * lanes) {
    Vector a = load(x), b = load(x + lanes);
    for (k = 2 * lanes; k + 2 * lanes <= classes; k += 2 * lanes) {
      a = maximum(load(x + k), a);
      b = maximum(load(x + k + lanes), b);
    }
    largest = horizontal_maximum(maximum(a, b));
  }
  for (; k < classes; ++k) largest = x[k] > largest ? x[k] : largest;
  return largest;
}

// A NaN may or may not become the maximum; the sum of exponentials is NaN either way.
template <class Scalar>
void max_and_log_sum(const Scalar* x, int64_t classes, Scalar* max, Scalar* log_sum) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  const Scalar largest = maximum_of_row(x, classes);
  Vector a = {}, b = {};
  int64_t k = 0;
  for (; k + 2 * lanes <= classes; k += 2 * lanes) {
    a += exponential(load(x + k) - largest);
    b += exponential(load(x + k + lanes) - largest);
  }
  Scalar sum = horizontal_sum(a + b);
  for (; k < classes; ++k) sum += exponential_of_one(x[k] - largest);
  *max = largest;
  *log_sum = logarithm(sum);
}

template <class Scalar>
Scalar soft_loss(const Scalar* x, const Scalar* q, int64_t classes, Scalar max, Scalar log_sum) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  Vector sums = {};
  int64_t k = 0;
  for (; k + lanes <= classes; k += lanes) sums += load(q + k) * (log_sum - (load(x + k) - max));
  Scalar sum = horizontal_sum(sums);
  for (; k < classes; ++k) sum += q[k] * (log_sum - (x[k] - max));
  return sum;
}

template <class Scalar>
void hard_gradient(const Scalar* x, int64_t classes, Scalar max, Scalar log_sum, Scalar scale, Scalar* gradient) {
  constexpr int lanes = Compute<Scalar>::lanes;
  int64_t k = 0;
  for (; k + lanes <= classes; k += lanes) store(gradient + k, exponential((load(x + k) - max) - log_sum) * scale);
  for (; k < classes; ++k) gradient[k] = exponential_of_one((x[k] - max) - log_sum) * scale;
}

template <class Scalar>
void soft_gradient(const Scalar* x, const Scalar* q, int64_t classes, Scalar max, Scalar log_sum, Scalar scale,
                   Scalar total, Scalar* gradient) {
  constexpr int lanes = Compute<Scalar>::lanes;
  int64_t k = 0;
  for (; k + lanes <= classes; k += lanes)
    store(gradient + k, (exponential((load(x + k) - max) - log_sum) * total - load(q + k)) * scale);
  for (; k < classes; ++k) gradient[k] = (exponential_of_one((x[k] - max) - log_sum) * total - q[k]) * scale;
}

template <class T>
void widen(const T* from, int64_t stride, int64_t count, float* to) {
  int64_t k = 0;
  if (stride == 1)
    for (; k + kFloatLanes <= count; k += kFloatLanes) store(to + k, load(from + k));
  for (; k < count; ++k) to[k] = to_compute(from[k * stride]);
}

template <class T>
void narrow(const float* from, int64_t count, T* to, int64_t stride) {
  for (int64_t k = 0; k < count; ++k) from_compute(from[k], to + k * stride);
}

template <class Scalar>
constexpr RowTable<Scalar> row_table() {
  return {max_and_log_sum<Scalar>, soft_loss<Scalar>, hard_gradient<Scalar>, soft_gradient<Scalar>};
}

}  // namespace

extern const RowTables row_tables;
const RowTables row_tables = {row_table<float>(), row_table<double>(), widen<Float16>,
                              widen<BFloat16>,    narrow<Float16>,     narrow<BFloat16>};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
