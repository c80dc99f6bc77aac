// The operator biasloss_ext::channel_gram; see biasloss_ext/ops/expand_depthwise/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace biasloss {

// (mean, gram): (C,) and (C, C).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> channel_gram_cpu(torch::stable::Tensor x);

}  // namespace biasloss
