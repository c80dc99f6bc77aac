// Products of channels and squeeze-and-excitation on matrices whose memory ends where it must.
#include <initializer_list>
#include <utility>
#include <vector>

#include "../../csrc/channel_gram/gram_simd.h"
#include "../../csrc/simd/padding.h"
#include "../../csrc/squeeze_excite/squeeze_excite_simd.h"
#include "cases.h"

namespace biasloss {
namespace {

template <class T>
void run_gram(int64_t rows, int64_t channels) {
  using Scalar = AccumulatorOf<T>;
  const GramTable& table = baseline::gram_table;
  const int64_t stride = buffer_stride<Scalar>(channels);
  const std::vector<T> x(rows * channels);
  std::vector<Scalar> pivot(stride), sum(stride), gram(channels * stride);
  std::vector<char> scratch(table.scratch_bytes(channels, sizeof(Scalar)));
  table.of(T())(x.data(), rows, channels, scratch.data(), pivot.data(), sum.data(), gram.data(), stride);
}

template <class T>
void run_squeeze_excite(const SqueezeExciteTable<T>& table, int64_t samples, int64_t channels, int64_t reduced) {
  const std::vector<T> pooled(samples * channels), weight(reduced * channels), bias(reduced);
  std::vector<T> squeezed(samples * reduced), hidden = squeezed, back(samples * channels), of_weight(weight.size());
  table.linear({pooled.data(), channels}, samples, weight.data(), bias.data(), 0, reduced, {squeezed.data(), reduced});
  for (const Activation activation :
       {Activation::relu, Activation::hardsigmoid, Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    table.activate(activation, squeezed.data(), samples * reduced, hidden.data());
    table.gradient(activation, squeezed.data(), squeezed.data(), samples * reduced, hidden.data());
  }
  const int64_t cut = channels / 2 / 16 * 16;
  for (const auto [begin, end] : {std::pair(int64_t(0), cut), std::pair(cut, channels)})
    table.combine({hidden.data(), reduced, 1}, samples, reduced, weight.data(), begin, end, {back.data(), channels});
  table.combine({hidden.data(), 1, reduced}, reduced, samples, pooled.data(), 0, channels,
                {of_weight.data(), channels});
}

}  // namespace

void run_small_matrices() {
  for (const int64_t rows : {1, 5, 40})
    for (const int64_t channels : {1, 3, 16, 33, 40}) {
      run_gram<float>(rows, channels);
      run_gram<double>(rows, channels);
      run_gram<Float16>(rows, channels);
      run_gram<BFloat16>(rows, channels);
      for (const int64_t reduced : {1, 4, 19}) {
        run_squeeze_excite(baseline::squeeze_excite_tables.float32, rows, channels, reduced);
        run_squeeze_excite(baseline::squeeze_excite_tables.float64, rows, channels, reduced);
      }
    }
}

}  // namespace biasloss
