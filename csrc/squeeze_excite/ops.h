// The operators biasloss_ext::squeeze_excite and its backward: see biasloss_ext/ops/squeeze_excite/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace biasloss {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> squeeze_excite_cpu(
    torch::stable::Tensor pooled, torch::stable::Tensor reduce_weight, torch::stable::Tensor reduce_bias,
    torch::stable::Tensor expand_weight, torch::stable::Tensor expand_bias, int64_t activation,
    int64_t gate_activation);
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
squeeze_excite_backward_cpu(torch::stable::Tensor gate_grad, torch::stable::Tensor pooled,
                            torch::stable::Tensor reduced, torch::stable::Tensor expanded,
                            torch::stable::Tensor reduce_weight, torch::stable::Tensor expand_weight,
                            int64_t activation, int64_t gate_activation);

}  // namespace biasloss
