// The operators biasloss_ext::expand_depthwise, expand_depthwise_activate and expand_depthwise_backward: see
// biasloss_ext/ops/expand_depthwise/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace biasloss {

// (y, moments)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> expand_depthwise_cpu(
    torch::stable::Tensor x, torch::stable::Tensor expand_weight, torch::stable::Tensor affine, int64_t activation,
    torch::stable::Tensor weight, int64_t stride, bool want_moments);

// (h, pooled)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> expand_depthwise_activate_cpu(
    torch::stable::Tensor x, torch::stable::Tensor expand_weight, torch::stable::Tensor affine, int64_t activation,
    torch::stable::Tensor weight, int64_t stride, torch::stable::Tensor y_affine, int64_t y_activation, bool want_pool);

// (grad_x, grad_expand, grad_weight, sums)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
expand_depthwise_backward_cpu(std::optional<torch::stable::Tensor> grad, std::optional<torch::stable::Tensor> pool_grad,
                              torch::stable::Tensor y, torch::stable::Tensor y_affine,
                              torch::stable::Tensor y_coefficients, int64_t y_activation, torch::stable::Tensor x,
                              torch::stable::Tensor x_mean, torch::stable::Tensor expand_weight,
                              torch::stable::Tensor affine, torch::stable::Tensor center, int64_t activation,
                              torch::stable::Tensor weight, int64_t stride);

}  // namespace biasloss
