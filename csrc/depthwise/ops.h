// The operators biasloss_ext::depthwise and biasloss_ext::depthwise_backward: see biasloss_ext/ops/depthwise/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace biasloss {

// (y, moments)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> depthwise_cpu(torch::stable::Tensor x,
                                                                       torch::stable::Tensor weight,
                                                                       std::optional<torch::stable::Tensor> affine,
                                                                       int64_t activation, int64_t stride,
                                                                       bool want_moments);

// (grad_x, grad_weight, sums)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> depthwise_backward_cpu(
    std::optional<torch::stable::Tensor> grad, std::optional<torch::stable::Tensor> pool_grad,
    std::optional<torch::stable::Tensor> y, std::optional<torch::stable::Tensor> y_affine,
    std::optional<torch::stable::Tensor> y_coefficients, int64_t y_activation, torch::stable::Tensor x,
    torch::stable::Tensor weight, std::optional<torch::stable::Tensor> affine,
    std::optional<torch::stable::Tensor> center, int64_t activation, int64_t stride, bool want_x, bool want_weight);

// (y, moments)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> depthwise_cuda(torch::stable::Tensor x,
                                                                        torch::stable::Tensor weight,
                                                                        std::optional<torch::stable::Tensor> affine,
                                                                        int64_t activation, int64_t stride,
                                                                        bool want_moments);

// (grad_x, grad_weight, sums)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> depthwise_backward_cuda(
    std::optional<torch::stable::Tensor> grad, std::optional<torch::stable::Tensor> pool_grad,
    std::optional<torch::stable::Tensor> y, std::optional<torch::stable::Tensor> y_affine,
    std::optional<torch::stable::Tensor> y_coefficients, int64_t y_activation, torch::stable::Tensor x,
    torch::stable::Tensor weight, std::optional<torch::stable::Tensor> affine,
    std::optional<torch::stable::Tensor> center, int64_t activation, int64_t stride, bool want_x, bool want_weight);

}  // namespace biasloss
