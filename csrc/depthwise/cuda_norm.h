// The arguments of a batch normalization as the kernels take them.
#pragma once

#include "../batch_norm/finish.h"
#include "../cpu/maps.h"
#include "../cuda/tensors.h"
#include "norm.cuh"

namespace biasloss {

template <class Acc>
Acc* mutable_values_of(const OptionalTensor& t, int64_t count, const char* name) {
  return const_cast<Acc*>(values_of<Acc>(t, count, name));
}

inline int64_t* counter_of(const OptionalTensor& num_batches_tracked) {
  if (!num_batches_tracked.has_value()) return nullptr;
  STD_TORCH_CHECK(num_batches_tracked->numel() == 1 && num_batches_tracked->scalar_type() == ScalarType::Long,
                  "num_batches_tracked: expected one int64 value");
  return mutable_data_of<int64_t>(*num_batches_tracked);
}

// Of a map of `count` values a channel, whose statistics go to a tensor (4, C).
template <class Acc>
NormParameters<Acc> norm_parameters(const NormArguments& norm, int64_t count, const Tensor& statistics) {
  const int64_t channels = statistics.size(1);
  return {values_of<Acc>(norm.weight, channels, "norm_weight"),
          values_of<Acc>(norm.bias, channels, "norm_bias"),
          mutable_values_of<Acc>(norm.running_mean, channels, "running_mean"),
          mutable_values_of<Acc>(norm.running_var, channels, "running_var"),
          counter_of(norm.num_batches_tracked),
          norm.momentum,
          norm.eps,
          static_cast<double>(count),
          mutable_data_of<Acc>(statistics)};
}

// The same for its gradient; coefficients (6, C).
template <class Acc>
NormGradientParameters<Acc> norm_gradient_parameters(const NormGradientArguments& norm, int64_t count,
                                                     const Tensor& coefficients) {
  const int64_t channels = coefficients.size(1);
  const Acc* const moments = values_of<Acc>(norm.moments, 2 * channels, "moments");
  return {values_of<Acc>(norm.affine, 2 * channels, "affine"),
          moments,
          moments + channels,
          norm.eps,
          static_cast<double>(count),
          norm.frozen || count == 0,
          mutable_data_of<Acc>(coefficients)};
}

}  // namespace biasloss
