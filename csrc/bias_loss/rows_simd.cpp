#include "rows_simd.h"

#include <math.h>

#include "../simd/vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// In float64: sums over any number of classes, one large term among them, stay exact.
typedef double WideVector __attribute__((vector_size(2 * BIASLOSS_VECTOR_BYTES)));
inline WideVector widened(const FloatVector& v) { return __builtin_convertvector(v, WideVector); }
inline DoubleVector widened(const DoubleVector& v) { return v; }

template <class V>
double sum_of_lanes(const V& v) {
  double sum = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) sum += v[i];
  return sum;
}

constexpr int64_t kVectorsOfSum = 16;  // whose sum in the precision of the scores is as exact

// A row as whole vectors and a last one, which overlaps the vector before it. A row shorter than one vector is copied
// into `padded`; the lanes in front of its values are no part of it either.
template <class Scalar>
struct Row {
  using Vector = typename Compute<Scalar>::Vector;
  static constexpr int lanes = Compute<Scalar>::lanes;

  explicit Row(int64_t classes) : whole(classes / lanes * lanes), rest(classes - whole), classes(classes) {}

  Vector last(const Scalar* x) const {
    if (whole > 0) return load(x + classes - lanes);
    Scalar padded[lanes] = {};
    for (int64_t k = 0; k < classes; ++k) padded[lanes - classes + k] = x[k];
    return load(padded);
  }

  void store_last(Scalar* to, const Vector& v) const {
    if (whole > 0) return store(to + classes - lanes, v);
    for (int64_t k = 0; k < classes; ++k) to[k] = v[lanes - classes + k];
  }

  int64_t whole, rest, classes;
};

template <class Scalar>
Scalar maximum_of_row(const Scalar* x, const Row<Scalar>& row) {
  using Vector = typename Compute<Scalar>::Vector;
  const Scalar lowest = -static_cast<Scalar>(INFINITY);
  Vector largest = Vector{} + lowest;
  for (int64_t k = 0; k < row.whole; k += row.lanes) largest = maximum(load(x + k), largest);
  if (row.rest > 0) largest = maximum(keep_last(row.last(x), row.rest, lowest), largest);
  return horizontal_maximum(largest);
}

// exp(gap) where the gap to the largest score is not 0, and how often it is: the ones would swallow the small terms of
// their lane, which are all of the loss where one score is far above the others.
template <class Vector>
struct SumBelowLargest {
  Vector largest = {}, rest = {};

  void add(const Vector& gap) {
    add(gap, [](const Vector& term) { return term; });
  }

  template <class Keep>
  void add(const Vector& gap, const Keep& keep) {
    const Vector none = {};
    const auto is_largest = gap == none;
    largest += keep(is_largest ? none + 1 : none);
    rest += keep(is_largest ? none : exponential(gap));
  }
};

// A NaN may or may not become the maximum; the sum of exponentials is NaN either way.
template <class Scalar>
void max_and_log_sum(const Scalar* x, int64_t classes, Scalar* max, Scalar* log_sum) {
  const Row<Scalar> row(classes);
  const Scalar top = maximum_of_row(x, row);
  using Vector = typename Compute<Scalar>::Vector;
  SumBelowLargest<Vector> sum;
  if (row.rest > 0)
    sum.add(row.last(x) - top, [&](const Vector& term) { return keep_last(term, row.rest, Scalar(0)); });
  auto largest = widened(sum.largest), rest = widened(sum.rest);
  for (int64_t begin = 0; begin < row.whole; begin += kVectorsOfSum * row.lanes) {
    const int64_t end = begin + kVectorsOfSum * row.lanes < row.whole ? begin + kVectorsOfSum * row.lanes : row.whole;
    sum = {};
    for (int64_t k = begin; k < end; k += row.lanes) sum.add(load(x + k) - top);
    largest += widened(sum.largest);
    rest += widened(sum.rest);
  }
  *max = top;
  *log_sum = Scalar(__builtin_log1p((sum_of_lanes(largest) - 1) + sum_of_lanes(rest)));
}

template <class Scalar>
Scalar soft_loss(const Scalar* x, const Scalar* q, int64_t classes, Scalar max, Scalar log_sum) {
  const Row<Scalar> row(classes);
  decltype(widened(typename Compute<Scalar>::Vector())) sum = {};
  for (int64_t k = 0; k < row.whole; k += row.lanes) sum += widened(load(q + k) * (log_sum - (load(x + k) - max)));
  if (row.rest > 0) sum += widened(keep_last(row.last(q) * (log_sum - (row.last(x) - max)), row.rest, Scalar(0)));
  return Scalar(sum_of_lanes(sum));
}

// The gradient may overwrite the scores: the last vector, which overlaps another, is read before anything is written.
template <class Scalar>
void hard_gradient(const Scalar* x, int64_t classes, Scalar max, Scalar log_sum, Scalar scale, Scalar* gradient) {
  const Row<Scalar> row(classes);
  const auto last = row.last(x);
  for (int64_t k = 0; k < row.whole; k += row.lanes)
    store(gradient + k, exponential((load(x + k) - max) - log_sum) * scale);
  if (row.rest > 0) row.store_last(gradient, exponential((last - max) - log_sum) * scale);
}

template <class Scalar>
void soft_gradient(const Scalar* x, const Scalar* q, int64_t classes, Scalar max, Scalar log_sum, Scalar scale,
                   Scalar total, Scalar* gradient) {
  const Row<Scalar> row(classes);
  const auto last = row.last(x);
  for (int64_t k = 0; k < row.whole; k += row.lanes)
    store(gradient + k, (exponential((load(x + k) - max) - log_sum) * total - load(q + k)) * scale);
  if (row.rest > 0) row.store_last(gradient, (exponential((last - max) - log_sum) * total - row.last(q)) * scale);
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
