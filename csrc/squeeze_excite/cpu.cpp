#include <vector>

#include "../batch_norm/finish.h"
#include "../cpu/activation.h"
#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "ops.h"
#include "squeeze_excite_simd.h"

namespace biasloss {
namespace {

struct Sizes {
  int64_t samples, channels, reduced;
};

Sizes sizes_of(const Tensor& pooled, const Tensor& reduce_weight) {
  STD_TORCH_CHECK(pooled.dim() == 2 && reduce_weight.dim() == 2 && reduce_weight.size(1) == pooled.size(1),
                  "squeeze_excite: expected pooled (N, C) and reduce_weight (R, C)");
  STD_TORCH_CHECK(pooled.scalar_type() == ScalarType::Float || pooled.scalar_type() == ScalarType::Double,
                  "squeeze_excite: expected float32 or float64");
  return {pooled.size(0), pooled.size(1), reduce_weight.size(0)};
}

// Calls body(begin, end) for every thread's part of [0, count), in whole steps. A weight is worth the same as sixteen
// products: it comes from memory.
template <class Body>
void parallel_parts(const Sizes& s, int64_t count, const Body& body) {
  constexpr int64_t step = 16;
  const int64_t steps = (count + step - 1) / step;
  parallel_shares(s.channels * s.reduced * (16 + s.samples) / 2, [&](int64_t share, int64_t shares) {
    body(std::min(count, steps * share / shares * step), std::min(count, steps * (share + 1) / shares * step));
  });
}

// The part of [0, count) that corresponds to [begin, end) of [0, whole).
std::pair<int64_t, int64_t> same_part(int64_t begin, int64_t end, int64_t whole, int64_t count) {
  if (whole == 0) return {0, count};
  return {count * begin / whole, count * end / whole};
}

// The sum over the rows of (rows, width).
template <class T>
void sum_rows(const T* x, int64_t rows, int64_t width, T* sum) {
  std::fill_n(sum, width, T(0));
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < width; ++n) sum[n] += x[m * width + n];
}

// sum(du) and sum(du * (y - mean)), (2, C), of the normalization before the pool: from its sums over every sample's
// positions, (4, N, C), completed by what the pool adds to each position.
template <class T>
void sum_samples(const T* sums, const T* pool_grad, const Sizes& s, int64_t positions, T* out) {
  const int64_t size = s.samples * s.channels;
  const double factor = 1.0 / static_cast<double>(std::max<int64_t>(positions, 1));
  parallel_shares(4 * size, [&](int64_t share, int64_t shares) {
    const int64_t begin = s.channels * share / shares, count = s.channels * (share + 1) / shares - begin;
    std::vector<double> du(count), du_centered(count);
    for (int64_t sample = 0; sample < s.samples; ++sample) {
      const T *p = pool_grad + sample * s.channels + begin, *at = sums + sample * s.channels + begin;
      for (int64_t i = 0; i < count; ++i) {
        const double shared = double(p[i]) * factor;
        du[i] += double(at[i]) + shared * double(at[size + i]);
        du_centered[i] += double(at[2 * size + i]) + shared * double(at[3 * size + i]);
      }
    }
    std::copy_n(du.data(), count, out + begin);
    std::copy_n(du_centered.data(), count, out + s.channels + begin);
  });
}

template <class F>
auto with_accumulator(ScalarType dtype, const F& f) {
  return dtype == ScalarType::Double ? f(double()) : f(float());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> squeeze_excite_cpu(Tensor pooled, Tensor reduce_weight, Tensor reduce_bias,
                                                      Tensor expand_weight, Tensor expand_bias, int64_t activation,
                                                      int64_t gate_activation) {
  const Sizes s = sizes_of(pooled, reduce_weight);
  const Activation of_hidden = checked_activation(activation, "squeeze_excite: activation");
  const Activation of_gate = checked_activation(gate_activation, "squeeze_excite: gate_activation");
  const ScalarType dtype = pooled.scalar_type();
  Tensor gate = empty_tensor({s.samples, s.channels}, dtype);
  Tensor reduced = empty_tensor({s.samples, s.reduced}, dtype);
  Tensor expanded = empty_tensor({s.samples, s.channels}, dtype);
  with_accumulator(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& table = squeeze_excite_tables().of(element);
    const T* x = values_of<T>(pooled, s.samples * s.channels, "squeeze_excite: pooled");
    const T* down = values_of<T>(reduce_weight, s.reduced * s.channels, "squeeze_excite: reduce_weight");
    const T* down_bias = values_of<T>(reduce_bias, s.reduced, "squeeze_excite: reduce_bias");
    const T* up = values_of<T>(expand_weight, s.reduced * s.channels, "squeeze_excite: expand_weight");
    const T* up_bias = values_of<T>(expand_bias, s.channels, "squeeze_excite: expand_bias");
    T* squeezed = static_cast<T*>(reduced.mutable_data_ptr());
    T* excited = static_cast<T*>(expanded.mutable_data_ptr());
    parallel_parts(s, s.reduced, [&](int64_t begin, int64_t end) {
      table.linear({x, s.channels}, s.samples, down, down_bias, begin, end, {squeezed, s.reduced});
    });
    std::vector<T> hidden(s.samples * s.reduced);
    table.activate(of_hidden, squeezed, s.samples * s.reduced, hidden.data());
    parallel_parts(s, s.channels, [&](int64_t begin, int64_t end) {
      table.linear({hidden.data(), s.reduced}, s.samples, up, up_bias, begin, end, {excited, s.channels});
    });
    table.activate(of_gate, excited, s.samples * s.channels, static_cast<T*>(gate.mutable_data_ptr()));
  });
  return {gate, reduced, expanded};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward_cpu(
    Tensor gate_grad, Tensor pooled, Tensor reduced, Tensor expanded, Tensor reduce_weight, Tensor expand_weight,
    int64_t activation, int64_t gate_activation, OptionalTensor sums, OptionalTensor affine, OptionalTensor moments,
    int64_t positions, double eps, bool frozen) {
  const Sizes s = sizes_of(pooled, reduce_weight);
  const Activation of_hidden = checked_activation(activation, "squeeze_excite_backward: activation");
  const Activation of_gate = checked_activation(gate_activation, "squeeze_excite_backward: gate_activation");
  const bool finishes = sums.has_value();
  STD_TORCH_CHECK(!finishes || (affine.has_value() && moments.has_value()),
                  "squeeze_excite_backward: sums need affine and moments, got ",
                  affine.has_value() ? "affine" : "no affine", " and ", moments.has_value() ? "moments" : "no moments");
  const ScalarType dtype = pooled.scalar_type();
  Tensor pool_grad = empty_tensor({s.samples, s.channels}, dtype);
  Tensor reduce_weight_grad = empty_tensor({s.reduced, s.channels}, dtype);
  Tensor reduce_bias_grad = empty_tensor({s.reduced}, dtype);
  Tensor expand_weight_grad = empty_tensor({s.channels, s.reduced}, dtype);
  Tensor expand_bias_grad = empty_tensor({s.channels}, dtype);
  Tensor coefficients = finishes ? empty_tensor({6, s.channels}, dtype) : empty_tensor({0}, dtype);
  with_accumulator(dtype, [&](auto element) {
    using T = decltype(element);
    const auto& table = squeeze_excite_tables().of(element);
    const int64_t wide = s.samples * s.channels, narrow = s.samples * s.reduced;
    const T* grad = values_of<T>(gate_grad, wide, "squeeze_excite_backward: gate_grad");
    const T* x = values_of<T>(pooled, wide, "squeeze_excite_backward: pooled");
    const T* squeezed = values_of<T>(reduced, narrow, "squeeze_excite_backward: reduced");
    const T* excited = values_of<T>(expanded, wide, "squeeze_excite_backward: expanded");
    const T* down = values_of<T>(reduce_weight, s.reduced * s.channels, "squeeze_excite_backward: reduce_weight");
    const T* up = values_of<T>(expand_weight, s.reduced * s.channels, "squeeze_excite_backward: expand_weight");
    const auto out = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    std::vector<T> d_excited(wide), hidden(narrow), d_hidden(narrow), d_squeezed(narrow);
    table.gradient(of_gate, grad, excited, wide, d_excited.data());
    table.activate(of_hidden, squeezed, narrow, hidden.data());
    sum_rows(d_excited.data(), s.samples, s.channels, out(expand_bias_grad));

    // The gradient of the one side goes by columns, that of the weight by rows: parts of the same share of both.
    parallel_parts(s, s.channels, [&](int64_t begin, int64_t end) {
      const auto [first, last] = same_part(begin, end, s.channels, s.reduced);
      table.combine({d_excited.data(), s.channels, 1}, s.samples, s.channels, up, first, last,
                    {d_hidden.data(), s.reduced});
      table.combine({d_excited.data() + begin, 1, s.channels}, end - begin, s.samples, hidden.data(), 0, s.reduced,
                    {out(expand_weight_grad) + begin * s.reduced, s.reduced});
    });
    table.gradient(of_hidden, d_hidden.data(), squeezed, narrow, d_squeezed.data());
    sum_rows(d_squeezed.data(), s.samples, s.reduced, out(reduce_bias_grad));
    parallel_parts(s, s.channels, [&](int64_t begin, int64_t end) {
      const auto [first, last] = same_part(begin, end, s.channels, s.reduced);
      table.combine({d_squeezed.data(), s.reduced, 1}, s.samples, s.reduced, down, begin, end,
                    {out(pool_grad), s.channels});
      table.combine({d_squeezed.data() + first, 1, s.reduced}, last - first, s.samples, x, 0, s.channels,
                    {out(reduce_weight_grad) + first * s.channels, s.channels});
    });
    if (finishes)
      sum_samples(values_of<T>(*sums, 4 * wide, "squeeze_excite_backward: sums"), out(pool_grad), s, positions,
                  row_of<T>(coefficients, 4));
  });
  if (finishes) finish_coefficients(coefficients, s.samples * positions, {*affine, *moments, eps, frozen});
  return {pool_grad, reduce_weight_grad, reduce_bias_grad, expand_weight_grad, expand_bias_grad, coefficients};
}

}  // namespace biasloss
