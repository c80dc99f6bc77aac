#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "ops.h"

namespace biasloss {
namespace {

// Of what a variance would be if the channels were uncorrelated: below it, the Gram matrix's rounding would show.
constexpr double kLeastShare = 1.0 / 64;
constexpr int64_t kRowsOfPiece = 512, kMostPieces = 8;

double widened(float x) { return x; }
double widened(double x) { return x; }
double widened(Float16 x) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits); }
double widened(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Scalar>
struct Product {
  const Scalar *mean, *gram, *weight;
  int64_t rows, channels, outputs;
  Scalar *weight_gram, *means, *variances;

  // Moments from the mean and the Gram matrix; returns the outputs for which these do not do.
  std::vector<int64_t> from_gram() const {
    std::vector<int64_t> doubtful;
    for (int64_t k = 0; k < outputs; ++k) {
      const Scalar *w = weight + k * channels, *row = weight_gram + k * channels;
      double total = 0, uncorrelated = 0, at_mean = 0;
      for (int64_t c = 0; c < channels; ++c) {
        at_mean += double(w[c]) * double(mean[c]);
        total += double(row[c]) * double(w[c]);
        uncorrelated += double(w[c]) * double(w[c]) * double(gram[c * channels + c]);
      }
      means[k] = Scalar(at_mean);
      variances[k] = Scalar(std::max(0.0, total) / double(rows));
      if (std::isnan(total)) variances[k] = Scalar(total);
      if (total < kLeastShare * uncorrelated) doubtful.push_back(k);
    }
    return doubtful;
  }

  // Of some outputs, moments and product with the Gram matrix, from the expanded map itself. Fixed pieces of rows are
  // summed in order: the result does not depend on the number of threads.
  template <class Element>
  void from_map(const Element* x, const std::vector<int64_t>& chosen) const {
    const int64_t count = int64_t(chosen.size()), cells = count * (channels + 2);
    const int64_t pieces = std::clamp<int64_t>(rows / kRowsOfPiece, 1, kMostPieces);
    std::vector<double> transposed(channels * count), sums(pieces * cells, 0.0);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; ++i) transposed[c * count + i] = double(weight[chosen[i] * channels + c]);
    parallel_shares(rows * cells, [&](int64_t share, int64_t shares) {
      std::vector<double> centered(channels), y(count);
      for (int64_t piece = pieces * share / shares; piece < pieces * (share + 1) / shares; ++piece) {
        double *sum = sums.data() + piece * cells, *squares = sum + count, *products = squares + count;
        for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row) {
          std::fill(y.begin(), y.end(), 0.0);
          for (int64_t c = 0; c < channels; ++c) {
            centered[c] = widened(x[row * channels + c]) - double(mean[c]);
            for (int64_t i = 0; i < count; ++i) y[i] += centered[c] * transposed[c * count + i];
          }
          for (int64_t i = 0; i < count; ++i) sum[i] += y[i];
          for (int64_t i = 0; i < count; ++i) squares[i] += y[i] * y[i];
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t i = 0; i < count; ++i) products[c * count + i] += centered[c] * y[i];
        }
      }
    });
    for (int64_t i = 0; i < cells; ++i)
      for (int64_t piece = 1; piece < pieces; ++piece) sums[i] += sums[piece * cells + i];
    for (int64_t i = 0; i < count; ++i) {
      // About the mean of x as it was rounded, which is not quite that of y.
      const double away = sums[i] / double(rows);
      double at_mean = 0;
      for (int64_t c = 0; c < channels; ++c) at_mean += transposed[c * count + i] * double(mean[c]);
      means[chosen[i]] = Scalar(at_mean + away);
      variances[chosen[i]] = Scalar(std::max(0.0, sums[count + i] / double(rows) - away * away));
      for (int64_t c = 0; c < channels; ++c) weight_gram[chosen[i] * channels + c] = Scalar(sums[(2 + c) * count + i]);
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> channel_gram_product_cpu(Tensor x, Tensor mean, Tensor gram, Tensor weight,
                                                    Tensor weight_gram) {
  const MapShape s = map_shape(x, "x");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == s.channels, "channel_gram_product: expected weight (K, ",
                  s.channels, ")");
  const int64_t outputs = weight.size(0);
  const ScalarType wide = accumulation_dtype(x.scalar_type());
  Tensor product = empty_tensor({outputs, s.channels}, wide), moments = empty_tensor({2, outputs}, wide);
  with_element(x.scalar_type(), [&](auto element, auto scalar) {
    using Element = decltype(element);
    using Scalar = decltype(scalar);
    const Product<Scalar> p = {values_of<Scalar>(mean, s.channels, "mean"),
                               values_of<Scalar>(gram, s.channels * s.channels, "gram"),
                               values_of<Scalar>(weight, outputs * s.channels, "weight"),
                               s.rows(),
                               s.channels,
                               outputs,
                               static_cast<Scalar*>(product.mutable_data_ptr()),
                               row_of<Scalar>(moments, 0),
                               row_of<Scalar>(moments, 1)};
    const Scalar* given = values_of<Scalar>(weight_gram, outputs * s.channels, "weight_gram");
    std::copy(given, given + outputs * s.channels, p.weight_gram);
    if (s.rows() == 0) {
      std::fill(p.means, p.means + 2 * outputs, Scalar(0));
      return;
    }
    const std::vector<int64_t> doubtful = p.from_gram();
    if (!doubtful.empty()) p.from_map(static_cast<const Element*>(x.const_data_ptr()), doubtful);
  });
  return {product, moments};
}

}  // namespace biasloss
