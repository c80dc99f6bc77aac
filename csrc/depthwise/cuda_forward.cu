#include "cuda_launch.h"
#include "finish.cuh"
#include "forward.cuh"
#include "ops.h"

namespace biasloss {
namespace {

constexpr const char* kName = "depthwise";

struct Forward {
  const Tensor &x, &weight;
  const std::optional<Tensor>& affine;
  Activation activation;
  const Tensor &y, &moments;
};

template <class T, class Acc, int kernel, int stride>
void launch_forward(const LaunchContext& context, const DepthwiseShape& shape, const Forward& f) {
  DepthwiseForwardParameters<T, Acc> p{};
  p.x = data_of<T>(f.x);
  p.y = mutable_data_of<T>(f.y);
  const auto plan = depthwise_plan<ForwardTiling<T, Acc, kernel, stride>>(context, shape.y, shape.x, {p.x, p.y});
  p.grid = plan.grid;
  p.weight = values_of<Acc>(f.weight, shape.x.channels * kernel * kernel, kName);
  p.affine = channel_rows<Acc>(kName, f.affine, 2, shape.x, f.moments.scalar_type());
  p.gate = gate_of<Acc>(f.activation);
  const int64_t blocks = plan.blocks_of_slab;
  const bool want_moments = f.moments.numel() > 0;
  const Tensor partial =
      new_tensor(f.moments, {want_moments ? 3 * blocks * shape.x.channels : 0}, f.moments.scalar_type());
  if (want_moments) p.partial = mutable_data_of<Acc>(partial);
  context.launch_with_shared(plan.shared_bytes, depthwise_forward_kernel<T, Acc, kernel, stride>,
                             dim3(plan.slabs, plan.blocks_of_slab), kDepthwiseThreads, p);
  if (want_moments)
    context.launch(depthwise_moments_kernel<Acc>, dim3((p.grid.channels + kWarpSize - 1) / kWarpSize), kFinishThreads,
                   static_cast<const Acc*>(p.partial), blocks, p.grid.channels, mutable_data_of<Acc>(f.moments));
}

}  // namespace

std::tuple<Tensor, Tensor> depthwise_cuda(Tensor x, Tensor weight, std::optional<Tensor> affine, int64_t activation,
                                          int64_t stride, bool want_moments) {
  const DepthwiseShape shape = depthwise_shape(kName, x, weight, stride, activation);
  STD_TORCH_CHECK(affine.has_value() || activation == int64_t(Activation::identity), kName,
                  ": expected the identity where there is no affine, got activation ", activation);
  const LaunchContext context(x);
  const ScalarType wide = accumulation_dtype(x.scalar_type());
  const Tensor y = new_map(x, shape.y);
  Tensor moments = want_moments ? new_tensor(x, {2, shape.x.channels}, wide) : new_tensor(x, {0}, wide);
  if (x.numel() == 0) {
    torch::stable::fill_(moments, 0.0);
    return {y, moments};
  }
  with_depthwise_kernel(x.scalar_type(), shape.kernel, stride, [&](auto element, auto accumulator, auto k, auto s) {
    launch_forward<decltype(element), decltype(accumulator), k(), s()>(
        context, shape, {x, weight, affine, static_cast<Activation>(activation), y, moments});
  });
  return {y, moments};
}

}  // namespace biasloss
