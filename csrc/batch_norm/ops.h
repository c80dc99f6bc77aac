// The operators biasloss_ext::batch_norm_*: see biasloss_ext/ops/batch_norm/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace biasloss {

torch::stable::Tensor batch_norm_moments_cpu(torch::stable::Tensor y);
torch::stable::Tensor batch_norm_apply_cpu(torch::stable::Tensor y, torch::stable::Tensor affine, int64_t activation,
                                           std::optional<torch::stable::Tensor> residual);
torch::stable::Tensor batch_norm_sums_cpu(torch::stable::Tensor grad, torch::stable::Tensor y,
                                          torch::stable::Tensor affine, torch::stable::Tensor center,
                                          int64_t activation);
torch::stable::Tensor batch_norm_backward_cpu(torch::stable::Tensor grad, torch::stable::Tensor y,
                                              torch::stable::Tensor affine, torch::stable::Tensor coefficients,
                                              int64_t activation);
torch::stable::Tensor batch_norm_affine_cpu(torch::stable::Tensor moments, std::optional<torch::stable::Tensor> weight,
                                            std::optional<torch::stable::Tensor> bias, double eps);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> batch_norm_coefficients_cpu(torch::stable::Tensor sums,
                                                                                     torch::stable::Tensor affine,
                                                                                     torch::stable::Tensor moments,
                                                                                     double eps, int64_t count,
                                                                                     bool frozen);

}  // namespace biasloss
