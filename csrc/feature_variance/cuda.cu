#include <limits>

#include "../cpu/maps.h"
#include "../cuda/launch.h"
#include "../cuda/tensors.h"
#include "../cuda/ticket_slots.h"
#include "kernels.cuh"
#include "ops.h"

namespace biasloss {
namespace {

template <class T, class Acc>
void launch_variance(const LaunchContext& context, const Tensor& features, const Tensor& variance,
                     const Tensor& extrema) {
  FeatureVarianceParameters<T, Acc> p{};
  p.samples = features.size(0);
  const int64_t activations = features.numel() / p.samples;
  p.splits = feature_splits(p.samples, activations, sizeof(T), multiprocessors(context.device()));
  p.features = {data_of<T>(features), features.stride(0), activations, slice_length(activations, p.splits, sizeof(T))};
  p.lanes_per_sample = lanes_for(p.splits);
  p.ticket = ticket_slot(context.device(), context.stream());
  const int64_t blocks = p.samples * p.splits;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "feature_variance: too many samples: ", p.samples);
  const Tensor partial = new_tensor(features, {3 * blocks}, variance.scalar_type());
  p.partial = mutable_data_of<Acc>(partial);
  p.variance = mutable_data_of<Acc>(variance);
  p.extrema = mutable_data_of<Acc>(extrema);
  context.launch(feature_variance_kernel<T, Acc>, dim3(static_cast<unsigned>(blocks)), kFeatureThreads, p);
}

}  // namespace

std::tuple<Tensor, Tensor> feature_variance_cuda(Tensor features) {
  STD_TORCH_CHECK(features.dim() >= 1, "feature_variance: expected features of shape (N, ...), got a scalar");
  const LaunchContext context(features);
  const ScalarType dtype = accumulation_dtype(features.scalar_type());
  Tensor variance = new_tensor(features, {features.size(0)}, dtype);
  Tensor extrema = new_tensor(features, {2}, dtype);
  if (features.size(0) == 0) {
    torch::stable::fill_(extrema, -std::numeric_limits<double>::infinity());
    return {variance, extrema};
  }
  const Tensor dense = samples_are_dense(features) ? features : torch::stable::contiguous(features);
  with_types(features.scalar_type(), [&](auto element, auto accumulator) {
    launch_variance<decltype(element), decltype(accumulator)>(context, dense, variance, extrema);
  });
  return {variance, extrema};
}

}  // namespace biasloss
