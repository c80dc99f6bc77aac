// The operators biasloss_ext::pointwise and biasloss_ext::pointwise_backward; see biasloss_ext/ops/pointwise/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace biasloss {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> pointwise_cpu(
    torch::stable::Tensor x, torch::stable::Tensor weight, std::optional<torch::stable::Tensor> affine,
    int64_t activation, std::optional<torch::stable::Tensor> gate, std::optional<torch::stable::Tensor> bias,
    int64_t output_activation, std::optional<torch::stable::Tensor> residual, bool want_moments);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
pointwise_backward_cpu(torch::stable::Tensor grad, std::optional<torch::stable::Tensor> y,
                       std::optional<torch::stable::Tensor> coefficients, torch::stable::Tensor x,
                       torch::stable::Tensor weight, std::optional<torch::stable::Tensor> affine,
                       std::optional<torch::stable::Tensor> center, int64_t activation,
                       std::optional<torch::stable::Tensor> gate, std::optional<torch::stable::Tensor> residual_grad,
                       bool want_x, bool want_weight);

}  // namespace biasloss
