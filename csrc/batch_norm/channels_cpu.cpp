// The ops on values per channel: a few kilobytes, on the calling thread.
#include <cmath>

#include "../cpu/maps.h"
#include "ops.h"

namespace biasloss {
namespace {

int64_t channels_of(const Tensor& pair, const char* name) {
  STD_TORCH_CHECK(pair.dim() == 2 && pair.size(0) == 2, name, ": expected shape (2, C)");
  STD_TORCH_CHECK(pair.scalar_type() == ScalarType::Float || pair.scalar_type() == ScalarType::Double, name,
                  ": expected float32 or float64");
  return pair.size(1);
}

template <class F>
void with_scalar(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

}  // namespace

Tensor batch_norm_affine_cpu(Tensor moments, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  const int64_t channels = channels_of(moments, "batch_norm_affine: moments");
  Tensor affine = empty_tensor({2, channels}, moments.scalar_type());
  with_scalar(moments, [&](auto scalar) {
    using T = decltype(scalar);
    const T* mean = values_of<T>(moments, 2 * channels, "batch_norm_affine: moments");
    const T* var = mean + channels;
    const T* w = values_of<T>(weight, channels, "batch_norm_affine: weight");
    const T* b = values_of<T>(bias, channels, "batch_norm_affine: bias");
    T* scale = static_cast<T*>(affine.mutable_data_ptr());
    T* shift = scale + channels;
    for (int64_t c = 0; c < channels; ++c) scale[c] = T(1) / std::sqrt(var[c] + T(eps));
    if (w != nullptr)
      for (int64_t c = 0; c < channels; ++c) scale[c] *= w[c];
    for (int64_t c = 0; c < channels; ++c) shift[c] = -scale[c] * mean[c];
    if (b != nullptr)
      for (int64_t c = 0; c < channels; ++c) shift[c] += b[c];
  });
  return affine;
}

std::tuple<Tensor, Tensor> batch_norm_coefficients_cpu(Tensor sums, Tensor affine, Tensor moments, double eps,
                                                       int64_t count, bool frozen) {
  const int64_t channels = channels_of(sums, "batch_norm_coefficients: sums");
  Tensor coefficients = empty_tensor({4, channels}, sums.scalar_type());
  Tensor parameter_grads = empty_tensor({2, channels}, sums.scalar_type());
  with_scalar(sums, [&](auto scalar) {
    using T = decltype(scalar);
    const T* du = values_of<T>(sums, 2 * channels, "batch_norm_coefficients: sums");
    const T* du_centred = du + channels;
    const T* scale = values_of<T>(affine, 2 * channels, "batch_norm_coefficients: affine");
    const T* mean = values_of<T>(moments, 2 * channels, "batch_norm_coefficients: moments");
    const T* var = mean + channels;
    T* a = static_cast<T*>(coefficients.mutable_data_ptr());
    T *b = a + channels, *k = b + channels, *center = k + channels;
    T* d_weight = static_cast<T*>(parameter_grads.mutable_data_ptr());
    T* d_bias = d_weight + channels;
    const T share = frozen || count == 0 ? T(0) : T(1) / static_cast<T>(count);
    for (int64_t c = 0; c < channels; ++c) {
      const T rstd = T(1) / std::sqrt(var[c] + T(eps));
      a[c] = scale[c];
      d_weight[c] = rstd * du_centred[c];
      d_bias[c] = du[c];
      b[c] = -scale[c] * rstd * d_weight[c] * share;
      k[c] = -scale[c] * du[c] * share;
      center[c] = mean[c];
    }
    if (frozen) std::fill_n(b, 2 * channels, T(0));  // also where the sums are not finite
  });
  return {coefficients, parameter_grads};
}

}  // namespace biasloss
