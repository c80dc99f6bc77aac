#include "pool_variance_simd.h"

#include "../simd/columns.h"
#include "../simd/narrow.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

template <class T, class Scalar>
void sums(const NormalizedMatrix<T>& m, Scalar* pivot, Scalar* sum) {
  with_activation(m.activation, [&](auto activation) {
    column_moments<activation.value, true, false>(m.x, m.rows, m.width, m.scale, m.shift, pivot, sum, sum);
  });
}

template <class T, class Scalar>
void moments(const NormalizedMatrix<T>& m, Scalar* pivot, Scalar* sum, Scalar* squares) {
  with_activation(m.activation, [&](auto activation) {
    column_moments<activation.value, true, true>(m.x, m.rows, m.width, m.scale, m.shift, pivot, sum, squares);
  });
}

template <Activation activation, class T, class Scalar>
void backward_as(const NormalizedMatrix<T>& m, const Scalar* grad, const Scalar* center, Scalar* sum, Scalar* centered,
                 T* out) {
  using V = typename Compute<T>::Vector;
  for_each_rows(m.rows, [&](int64_t row, int64_t at_once) {
    const int64_t start = row * m.width;
    for_each_vector<Compute<T>::lanes>(m.width, [&](int64_t j, int64_t slot) {
      V u = {}, v = {};
      const V g = load(grad + j), scale = load(m.scale + j), shift = load(m.shift + j), middle = load(center + j);
      for (int r = 0; r < at_once; ++r) {
        const int64_t at = start + r * m.width + j;
        const V x = load(m.x + at);
        const V du = g * derivative<activation>(x * scale + shift);
        store_as(out + at, du);
        u += du;
        v += du * (x - middle);
      }
      store(sum + slot, load(sum + slot) + u);
      store(centered + slot, load(centered + slot) + v);
    });
  });
}

template <class T, class Scalar>
void backward(const NormalizedMatrix<T>& m, const Scalar* grad, const Scalar* center, Scalar* sum, Scalar* centered,
              T* out) {
  with_activation(m.activation,
                  [&](auto activation) { backward_as<activation.value>(m, grad, center, sum, centered, out); });
}

template <class T>
constexpr PoolTable<T> table() {
  using Scalar = AccumulatorOf<T>;
  return {Compute<T>::lanes,
          sums<T, Scalar>,
          moments<T, Scalar>,
          add_totals<Scalar>,
          add_deviations<Scalar>,
          backward<T, Scalar>,
          settle<Compute<T>::lanes, Scalar>,
          add_sums<Scalar>};
}

}  // namespace

extern const PoolTables pool_tables;
const PoolTables pool_tables = {table<float>(), table<double>(), table<Float16>(), table<BFloat16>()};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
