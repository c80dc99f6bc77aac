#include "batch_norm_simd.h"

#include "../simd/columns.h"
#include "../simd/narrow.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

template <class T, class Scalar>
void moments(const T* y, int64_t rows, int64_t width, Scalar* pivot, Scalar* sum, Scalar* squares) {
  column_moments<Activation::identity, false, true>(y, rows, width, pivot, pivot, pivot, sum, squares);
}

template <Activation activation, bool residual, class T>
void apply_as(const NormalizedMatrix<T>& m, const T* other, T* out) {
  using V = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  for (int64_t row = 0; row < m.rows; ++row) {
    const int64_t start = row * m.width;
    for_each_vector<lanes>(m.width, [&](int64_t j, int64_t) {
      V h = activate<activation>(load(m.x + start + j) * load(m.scale + j) + load(m.shift + j));
      if constexpr (residual) h += load(other + start + j);
      store_as(out + start + j, h);
    });
  }
}

template <class T>
void apply(const NormalizedMatrix<T>& m, const T* residual, T* out) {
  with_activation(m.activation, [&](auto activation) {
    if (residual == nullptr) return apply_as<activation.value, false>(m, residual, out);
    apply_as<activation.value, true>(m, residual, out);
  });
}

template <Activation activation, class V, class M>
inline V gradient_at_u(const M& m, const V& grad, const V& y, int64_t j) {
  if constexpr (activation == Activation::identity) return grad;
  return grad * derivative<activation>(y * load(m.scale + j) + load(m.shift + j));
}

template <Activation activation, class T, class Scalar>
void sums_as(const NormalizedMatrix<T>& m, const T* grad, const Scalar* center, Scalar* sum, Scalar* centered) {
  using V = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  for (int64_t j = 0; j < m.width + lanes; ++j) sum[j] = centered[j] = 0;
  for_each_rows(m.rows, [&](int64_t row, int64_t at_once) {
    const int64_t start = row * m.width;
    for_each_vector<lanes>(m.width, [&](int64_t j, int64_t slot) {
      V u = {}, v = {};
      const V middle = load(center + j);
      for (int r = 0; r < at_once; ++r) {
        const int64_t at = start + r * m.width + j;
        const V y = load(m.x + at);
        const V du = gradient_at_u<activation>(m, load(grad + at), y, j);
        u += du;
        v += du * (y - middle);
      }
      store(sum + slot, load(sum + slot) + u);
      store(centered + slot, load(centered + slot) + v);
    });
  });
  settle<lanes>(sum, m.width);
  settle<lanes>(centered, m.width);
}

template <class T, class Scalar>
void sums(const NormalizedMatrix<T>& m, const T* grad, const Scalar* center, Scalar* sum, Scalar* centered) {
  with_activation(m.activation, [&](auto activation) { sums_as<activation.value>(m, grad, center, sum, centered); });
}

template <class T>
void backward(const NormalizedMatrix<T>& m, const T* grad, const typename BatchNormTable<T>::Coefficients& k, T* out) {
  using V = typename Compute<T>::Vector;
  with_activation(m.activation, [&](auto activation) {
    for (int64_t row = 0; row < m.rows; ++row) {
      const int64_t start = row * m.width;
      for_each_vector<Compute<T>::lanes>(m.width, [&](int64_t j, int64_t) {
        const V y = load(m.x + start + j);
        const V du = gradient_at_u<activation.value>(m, load(grad + start + j), y, j);
        const V dy = load(k.a + j) * du + (load(k.b + j) * (y - load(k.center + j)) + load(k.c + j));
        store_as(out + start + j, dy);
      });
    }
  });
}

template <class T>
constexpr BatchNormTable<T> table() {
  using Scalar = AccumulatorOf<T>;
  return {Compute<T>::lanes, moments<T, Scalar>, add_totals<Scalar>, add_deviations<Scalar>,
          apply<T>,          sums<T, Scalar>,    add_sums<Scalar>,   backward<T>};
}

}  // namespace

extern const BatchNormTables batch_norm_tables;
const BatchNormTables batch_norm_tables = {table<float>(), table<double>(), table<Float16>(), table<BFloat16>()};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
