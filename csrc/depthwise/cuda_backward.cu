#include "backward.cuh"
#include "cuda_launch.h"
#include "finish.cuh"
#include "ops.h"

namespace biasloss {
namespace {

constexpr const char* kName = "depthwise_backward";

struct Backward {
  const std::optional<Tensor>&grad, &pool_grad, &y, &y_affine, &y_coefficients;
  Activation y_activation;
  const Tensor &x, &weight;
  const std::optional<Tensor>&affine, &center;
  Activation activation;
  const Tensor &grad_x, &grad_weight, &sums;  // no elements: not wanted
};

template <class T, class Acc, int kernel, int stride>
void launch_backward(const LaunchContext& context, const DepthwiseShape& shape, const Backward& b) {
  const int64_t channels = shape.x.channels;
  const ScalarType wide = b.weight.scalar_type();
  DepthwiseBackwardParameters<T, Acc> p{};
  p.grad = data_of<T>(b.grad);
  p.y = data_of<T>(b.y);
  p.x = data_of<T>(b.x);
  p.grad_x = b.grad_x.numel() > 0 ? mutable_data_of<T>(b.grad_x) : nullptr;
  const auto plan =
      depthwise_plan<BackwardTiling<T, Acc, kernel, stride>>(context, shape.x, shape.y, {p.grad, p.y, p.x, p.grad_x});
  p.grid = plan.grid;
  p.pool_grad = channel_rows<Acc>(kName, b.pool_grad, shape.x.samples, shape.x, wide);
  p.pool_share = Acc(1) / static_cast<Acc>(shape.y.positions());
  p.y_affine = channel_rows<Acc>(kName, b.y_affine, 2, shape.x, wide);
  p.y_coefficients = channel_rows<Acc>(kName, b.y_coefficients, 4, shape.x, wide);
  p.y_gate = gate_of<Acc>(b.y_activation);
  p.weight = values_of<Acc>(b.weight, channels * kernel * kernel, kName);
  p.affine = channel_rows<Acc>(kName, b.affine, 2, shape.x, wide);
  p.center = channel_rows<Acc>(kName, b.center, 1, shape.x, wide);
  p.gate = gate_of<Acc>(b.activation);
  constexpr unsigned kTaps = kernel * kernel;
  const int64_t blocks = plan.blocks_of_slab, length = (kTaps + 2) * channels;
  const Tensor partial = new_tensor(b.weight, {blocks * length}, wide);
  p.partial = mutable_data_of<Acc>(partial);
  context.launch_with_shared(plan.shared_bytes, depthwise_backward_kernel<T, Acc, kernel, stride>,
                             dim3(plan.slabs, plan.blocks_of_slab), kDepthwiseThreads, p);
  Acc* const grad_weight = b.grad_weight.numel() > 0 ? mutable_data_of<Acc>(b.grad_weight) : nullptr;
  Acc* const sums = b.sums.numel() > 0 ? mutable_data_of<Acc>(b.sums) : nullptr;
  if (grad_weight != nullptr || sums != nullptr)
    context.launch(depthwise_sums_kernel<Acc>, dim3(unsigned((length + kWarpSize - 1) / kWarpSize)), kFinishThreads,
                   static_cast<const Acc*>(p.partial), blocks, p.grid.channels, kTaps, grad_weight, sums);
}

// Raises where the arguments besides x and the weight do not fit.
void check_arguments(const DepthwiseShape& shape, const Backward& b) {
  check_map(kName, b.grad, shape.y, b.x);
  check_map(kName, b.y, shape.y, b.x);
  STD_TORCH_CHECK(b.y.has_value() == b.y_coefficients.has_value(), kName, ": y and its coefficients go together");
  STD_TORCH_CHECK(b.y.has_value() || (b.grad.has_value() && !b.pool_grad.has_value() && !b.y_affine.has_value()), kName,
                  ": without y expected grad alone");
  STD_TORCH_CHECK(b.affine.has_value() || b.activation == Activation::identity, kName,
                  ": expected the identity where there is no affine");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> depthwise_backward_cuda(std::optional<Tensor> grad, std::optional<Tensor> pool_grad,
                                                           std::optional<Tensor> y, std::optional<Tensor> y_affine,
                                                           std::optional<Tensor> y_coefficients, int64_t y_activation,
                                                           Tensor x, Tensor weight, std::optional<Tensor> affine,
                                                           std::optional<Tensor> center, int64_t activation,
                                                           int64_t stride, bool want_x, bool want_weight) {
  const DepthwiseShape shape = depthwise_shape(kName, x, weight, stride, activation);
  const LaunchContext context(x);
  const ScalarType wide = weight.scalar_type();
  const Tensor grad_x = want_x ? new_map(x, shape.x) : new_tensor(x, {0}, x.scalar_type());
  Tensor grad_weight =
      want_weight ? new_tensor(x, {shape.x.channels, 1, shape.kernel, shape.kernel}, wide) : new_tensor(x, {0}, wide);
  Tensor sums = center.has_value() ? new_tensor(x, {2, shape.x.channels}, wide) : new_tensor(x, {0}, wide);
  if (pool_grad.has_value()) pool_grad = torch::stable::contiguous(with_dtype(*pool_grad, wide));
  const Backward b = {grad,
                      pool_grad,
                      y,
                      y_affine,
                      y_coefficients,
                      static_cast<Activation>(y_activation),
                      x,
                      weight,
                      affine,
                      center,
                      static_cast<Activation>(activation),
                      grad_x,
                      grad_weight,
                      sums};
  check_arguments(shape, b);
  if (x.numel() == 0) {
    torch::stable::fill_(grad_weight, 0.0);
    torch::stable::fill_(sums, 0.0);
    return {grad_x, grad_weight, sums};
  }
  if (!want_x && !want_weight && !center.has_value()) return {grad_x, grad_weight, sums};
  with_depthwise_kernel(x.scalar_type(), shape.kernel, stride, [&](auto element, auto accumulator, auto k, auto s) {
    launch_backward<decltype(element), decltype(accumulator), k(), s()>(context, shape, b);
  });
  return {grad_x, grad_weight, sums};
}

}  // namespace biasloss
