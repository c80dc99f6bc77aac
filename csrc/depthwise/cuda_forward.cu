#include "../cuda/ticket_slots.h"
#include "cuda_launch.h"
#include "cuda_norm.h"
#include "forward.cuh"
#include "ops.h"

namespace biasloss {
namespace {

constexpr const char* kName = "depthwise";

struct Forward {
  const Tensor &x, &weight;
  const OptionalTensor& affine;
  Activation activation;
  NormArguments norm;
  const Tensor &y, &statistics;  // statistics without elements: not wanted
};

template <class T, class Acc, int kernel, int stride>
void launch_forward(const LaunchContext& context, const DepthwiseShape& shape, const Forward& f) {
  using Tiling = ForwardTiling<T, Acc, kernel, stride>;
  const bool finishes = f.statistics.dim() == 2;
  if (f.x.numel() == 0 && !finishes) return;
  DepthwiseForwardParameters<T, Acc> p{};
  p.x = data_of<T>(f.x);
  p.y = mutable_data_of<T>(f.y);
  const auto plan = depthwise_plan<Tiling>(context, shape, shape.y, shape.x, {p.x, p.y});
  p.grid = plan.grid;
  p.weight = values_of<Acc>(f.weight, shape.x.channels * kernel * kernel, "weight");
  p.affine = values_of<Acc>(f.affine, 2 * shape.x.channels, "affine");
  p.gate = gate_of<Acc>(f.activation);
  const Tensor partial =
      new_tensor(f.statistics, {finishes ? plan.partial_values(kRowsOfMoments) : 0}, f.statistics.scalar_type());
  if (finishes) {
    p.partial = mutable_data_of<Acc>(partial);
    p.ticket_slot = ticket_slot(context.device(), context.stream());
    p.norm = norm_parameters<Acc>(f.norm, shape.y.rows(), f.statistics);
  }
  context.launch_with_shared(plan.shared_bytes, depthwise_forward_kernel<T, Acc, kernel, stride>,
                             dim3(plan.slabs, plan.blocks_of_slab), kDepthwiseThreads, p);
}

}  // namespace

std::tuple<Tensor, Tensor> depthwise_cuda(Tensor x, Tensor weight, OptionalTensor affine, int64_t activation,
                                          int64_t stride, bool same_padding, bool want_statistics,
                                          OptionalTensor norm_weight, OptionalTensor norm_bias,
                                          OptionalTensor running_mean, OptionalTensor running_var,
                                          OptionalTensor num_batches_tracked, double momentum, double eps) {
  const DepthwiseShape shape = depthwise_shape(kName, x, weight, stride, same_padding);
  const Activation function = checked_activation(activation, "activation");
  STD_TORCH_CHECK(affine.has_value() || function == Activation::identity, kName,
                  ": expected activation 0 (identity) without affine, got ", activation);
  const LaunchContext context(x);
  const ScalarType wide = accumulation_dtype(x.scalar_type());
  const Tensor y = new_map(x, shape.y);
  const Tensor statistics = want_statistics ? new_tensor(x, {4, shape.x.channels}, wide) : new_tensor(x, {0}, wide);
  const NormArguments norm = {norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, momentum, eps};
  with_depthwise_kernel(x.scalar_type(), shape.kernel, stride, [&](auto element, auto accumulator, auto k, auto s) {
    launch_forward<decltype(element), decltype(accumulator), k(), s()>(
        context, shape, {x, weight, affine, function, norm, y, statistics});
  });
  return {y, statistics};
}

}  // namespace biasloss
