#include "cpu.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <utility>

#include "../cpu/empty.h"
#include "../cpu/parallel.h"
#include "../dense_samples.h"
#include "../math/bias_weight.h"
#include "moments_simd.h"
#include "ops.h"

namespace biasloss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPieceLength = 16384;

void check_features(const Tensor& features) {
  const ScalarType dtype = features.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  "feature_variance: expected float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(features.dim() >= 1, "feature_variance: expected features of shape (N, *), got 0 dimensions");
  for (int64_t d = 1; d < features.dim(); ++d)
    STD_TORCH_CHECK(features.size(d) > 0, "feature_variance: expected at least one activation a sample, got size 0 in ",
                    "dimension ", d);
}

}  // namespace

FeatureMoments::FeatureMoments(const Tensor& features)
    : features_(samples_are_dense(features) ? features : torch::stable::contiguous(features)),
      samples_(features.size(0)),
      length_(samples_ == 0 ? 0 : features.numel() / samples_),
      pieces_per_sample_((length_ + kPieceLength - 1) / kPieceLength),
      partial_(static_cast<size_t>(pieces())) {}

void FeatureMoments::compute(int64_t begin, int64_t end) {
  const MomentsTable& table = moments_table();
  const ScalarType dtype = features_.scalar_type();
  const void* data = features_.const_data_ptr();
  const int64_t sample_stride = features_.stride(0);
  // From the back: what the network wrote last is still in the cache.
  for (int64_t piece = end - 1; piece >= begin; --piece) {
    const int64_t start = piece % pieces_per_sample_ * kPieceLength;
    const int64_t offset = piece / pieces_per_sample_ * sample_stride + start;
    const int64_t length = std::min(kPieceLength, length_ - start);
    switch (dtype) {
      case ScalarType::Float:
        partial_[piece] = table.of_float32(static_cast<const float*>(data) + offset, length);
        break;
      case ScalarType::Double:
        partial_[piece] = table.of_float64(static_cast<const double*>(data) + offset, length);
        break;
      case ScalarType::Half:
        partial_[piece] =
            table.of_float16(reinterpret_cast<const Float16*>(static_cast<const uint16_t*>(data) + offset), length);
        break;
      default:
        partial_[piece] =
            table.of_bfloat16(reinterpret_cast<const BFloat16*>(static_cast<const uint16_t*>(data) + offset), length);
    }
  }
}

double FeatureMoments::variance(int64_t sample) const {
  const Moments<double>* pieces = partial_.data() + sample * pieces_per_sample_;
  Moments<double> total = pieces[0];
  for (int64_t i = 1; i < pieces_per_sample_; ++i) total = merge(total, pieces[i]);
  const double variance = unbiased_variance(total);
  return features_.scalar_type() == ScalarType::Double ? variance : static_cast<float>(variance);
}

std::tuple<Tensor, Tensor> feature_variance_cpu(Tensor features) {
  check_features(features);
  FeatureMoments moments(features);
  parallel_shares(moments.activations(), [&](int64_t share, int64_t shares) {
    moments.compute(moments.pieces() * share / shares, moments.pieces() * (share + 1) / shares);
  });
  const int64_t samples = features.size(0);
  const bool wide = features.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor variance = empty_tensor({samples}, dtype);
  Tensor extrema = empty_tensor({2}, dtype);
  const auto fill = [&](auto* out, auto* ends) {
    auto reached = empty_extrema<std::remove_pointer_t<decltype(out)>>();
    for (int64_t i = 0; i < samples; ++i) {
      out[i] = moments.variance(i);
      reached = merge(reached, extrema_of(out[i]));
    }
    ends[0] = reached.negated_min;
    ends[1] = reached.max;
  };
  if (wide)
    fill(variance.mutable_data_ptr<double>(), extrema.mutable_data_ptr<double>());
  else
    fill(variance.mutable_data_ptr<float>(), extrema.mutable_data_ptr<float>());
  return {variance, extrema};
}

}  // namespace biasloss
