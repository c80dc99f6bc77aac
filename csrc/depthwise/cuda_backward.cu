#include "../cuda/ticket_slots.h"
#include "backward.cuh"
#include "cuda_launch.h"
#include "cuda_norm.h"
#include "ops.h"

namespace biasloss {
namespace {

constexpr const char* kName = "depthwise_backward";

struct Backward {
  const Tensor &x, &weight;
  const OptionalTensor &grad, &pool_grad, &y, &y_affine, &y_coefficients;
  Activation y_activation;
  const OptionalTensor &affine, &moments;
  Activation activation;
  const OptionalTensor& residual_grad;
  double eps;
  bool frozen;
  const Tensor &grad_x, &grad_weight, &coefficients;  // one dimension: not wanted

  bool has_sums() const { return grad_weight.dim() == 4 || coefficients.dim() == 2; }
};

template <class T, class Acc>
void read_output_gradient(const Backward& b, const DepthwiseShape& shape, DepthwiseBackwardParameters<T, Acc>& p) {
  const int64_t channels = shape.x.channels;
  p.grad = data_of<T>(b.grad);
  p.y = data_of<T>(b.y);
  p.pool_grad = values_of<Acc>(b.pool_grad, shape.x.samples * channels, "pool_grad");
  p.pool_share = Acc(1) / static_cast<Acc>(shape.y.positions());
  p.y_affine = values_of<Acc>(b.y_affine, 2 * channels, "y_affine");
  p.y_coefficients = values_of<Acc>(b.y_coefficients, 6 * channels, "y_coefficients");
  p.y_gate = gate_of<Acc>(b.y_activation);
}

template <class T, class Acc, int kernel, int stride>
void launch_backward(const LaunchContext& context, const DepthwiseShape& shape, const Backward& b) {
  using Tiling = BackwardTiling<T, Acc, kernel, stride>;
  const int64_t channels = shape.x.channels;
  DepthwiseBackwardParameters<T, Acc> p{};
  read_output_gradient(b, shape, p);
  p.x = data_of<T>(b.x);
  p.weight = values_of<Acc>(b.weight, channels * kernel * kernel, "weight");
  p.affine = values_of<Acc>(b.affine, 2 * channels, "affine");
  p.gate = gate_of<Acc>(b.activation);
  p.residual_grad = data_of<T>(b.residual_grad);
  if (b.grad_x.dim() == 4) p.grad_x = mutable_data_of<T>(b.grad_x);
  const auto plan =
      depthwise_plan<Tiling>(context, shape, shape.x, shape.y, {p.grad, p.y, p.x, p.residual_grad, p.grad_x});
  p.grid = plan.grid;
  const ScalarType wide = b.weight.scalar_type();
  const Tensor partial = new_tensor(b.weight, {b.has_sums() ? plan.partial_values(Tiling::kTaps + 2) : 0}, wide);
  if (b.has_sums()) {
    p.partial = mutable_data_of<Acc>(partial);
    p.ticket_slot = ticket_slot(context.device(), context.stream());
  }
  if (b.grad_weight.dim() == 4) p.grad_weight = mutable_data_of<Acc>(b.grad_weight);
  if (b.moments.has_value())
    p.norm = norm_gradient_parameters<Acc>({*b.affine, *b.moments, b.eps, b.frozen}, shape.x.rows(), b.coefficients);
  context.launch_with_shared(plan.shared_bytes, depthwise_backward_kernel<T, Acc, kernel, stride>,
                             dim3(plan.slabs, plan.blocks_of_slab), kDepthwiseThreads, p);
}

// Raises where the arguments besides x and the weight do not fit.
void check_arguments(const DepthwiseShape& shape, const Backward& b) {
  check_map(kName, "grad", b.grad, shape.y, b.x);
  check_map(kName, "y", b.y, shape.y, b.x);
  check_map(kName, "residual_grad", b.residual_grad, shape.x, b.x);
  STD_TORCH_CHECK(b.y.has_value() == b.y_coefficients.has_value(), kName,
                  ": expected y and y_coefficients, or neither");
  STD_TORCH_CHECK(b.y.has_value() || (b.grad.has_value() && !b.pool_grad.has_value() && !b.y_affine.has_value()), kName,
                  ": expected grad, and neither pool_grad nor y_affine, without y");
  STD_TORCH_CHECK(b.affine.has_value() || b.activation == Activation::identity, kName,
                  ": expected activation 0 (identity) without affine, got ", int64_t(b.activation));
  STD_TORCH_CHECK(b.affine.has_value() || !b.moments.has_value(), kName, ": moments need affine, got none");
  STD_TORCH_CHECK(!b.residual_grad.has_value() || !b.moments.has_value(), kName,
                  ": expected residual_grad or moments, got both: the gradient behind a normalization has no residual");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> depthwise_backward_cuda(Tensor x, Tensor weight, OptionalTensor grad,
                                                           OptionalTensor pool_grad, OptionalTensor y,
                                                           OptionalTensor y_affine, OptionalTensor y_coefficients,
                                                           int64_t y_activation, OptionalTensor affine,
                                                           OptionalTensor moments, int64_t activation, int64_t stride,
                                                           bool same_padding, OptionalTensor residual_grad, bool want_x,
                                                           bool want_weight, double eps, bool frozen) {
  const DepthwiseShape shape = depthwise_shape(kName, x, weight, stride, same_padding);
  const LaunchContext context(x);
  const ScalarType wide = weight.scalar_type();
  const Tensor grad_x = want_x ? new_map(x, shape.x) : new_tensor(x, {0}, x.scalar_type());
  const Tensor grad_weight =
      want_weight ? new_tensor(x, {shape.x.channels, 1, shape.kernel, shape.kernel}, wide) : new_tensor(x, {0}, wide);
  const Tensor coefficients =
      moments.has_value() ? new_tensor(x, {6, shape.x.channels}, wide) : new_tensor(x, {0}, wide);
  if (pool_grad.has_value()) pool_grad = torch::stable::contiguous(with_dtype(*pool_grad, wide));
  const Backward b = {x,
                      weight,
                      grad,
                      pool_grad,
                      y,
                      y_affine,
                      y_coefficients,
                      checked_activation(y_activation, "y_activation"),
                      affine,
                      moments,
                      checked_activation(activation, "activation"),
                      residual_grad,
                      eps,
                      frozen,
                      grad_x,
                      grad_weight,
                      coefficients};
  check_arguments(shape, b);
  if (grad_x.numel() == 0 && !b.has_sums()) return {grad_x, grad_weight, coefficients};
  with_depthwise_kernel(x.scalar_type(), shape.kernel, stride, [&](auto element, auto accumulator, auto k, auto s) {
    launch_backward<decltype(element), decltype(accumulator), k(), s()>(context, shape, b);
  });
  return {grad_x, grad_weight, coefficients};
}

}  // namespace biasloss
