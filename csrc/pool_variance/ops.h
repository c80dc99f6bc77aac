// The operators biasloss_ext::pool_variance and its backward: see biasloss_ext/ops/pool_variance/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace biasloss {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> pool_variance_cpu(torch::stable::Tensor x,
                                                                           std::optional<torch::stable::Tensor> affine,
                                                                           int64_t activation, bool want_variance);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> pool_variance_backward_cpu(
    torch::stable::Tensor pool_grad, torch::stable::Tensor x, std::optional<torch::stable::Tensor> affine,
    std::optional<torch::stable::Tensor> center, int64_t activation);

}  // namespace biasloss
