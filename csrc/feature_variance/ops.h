// The operator biasloss_ext::feature_variance, one function a device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace biasloss {

// (variance, extrema): the variance of every sample's activations, (N,), and (-min, max) of it over the batch, (2,).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> feature_variance_cpu(torch::stable::Tensor features);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> feature_variance_cuda(torch::stable::Tensor features);

}  // namespace biasloss
