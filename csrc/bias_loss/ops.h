// The operators biasloss_ext::bias_loss and biasloss_ext::bias_loss_backward, one function a device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace biasloss {

// (loss, weight, statistics); statistics.h has what is in the last.
using BiasLossResult = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

BiasLossResult bias_loss_cpu(std::optional<torch::stable::Tensor> features,
                             std::optional<torch::stable::Tensor> variance,
                             std::optional<torch::stable::Tensor> extrema, torch::stable::Tensor output,
                             torch::stable::Tensor target, std::optional<torch::stable::Tensor> class_weight,
                             std::optional<torch::stable::Tensor> running_min, double alpha, double beta,
                             bool update_running_min, int64_t reduction, int64_t ignore_index, double label_smoothing);
BiasLossResult bias_loss_cuda(std::optional<torch::stable::Tensor> features,
                              std::optional<torch::stable::Tensor> variance,
                              std::optional<torch::stable::Tensor> extrema, torch::stable::Tensor output,
                              torch::stable::Tensor target, std::optional<torch::stable::Tensor> class_weight,
                              std::optional<torch::stable::Tensor> running_min, double alpha, double beta,
                              bool update_running_min, int64_t reduction, int64_t ignore_index, double label_smoothing);

torch::stable::Tensor bias_loss_backward_cpu(torch::stable::Tensor grad_loss, torch::stable::Tensor output,
                                             torch::stable::Tensor target,
                                             std::optional<torch::stable::Tensor> class_weight,
                                             torch::stable::Tensor weight, torch::stable::Tensor statistics,
                                             int64_t reduction, int64_t ignore_index, double label_smoothing);
torch::stable::Tensor bias_loss_backward_cuda(torch::stable::Tensor grad_loss, torch::stable::Tensor output,
                                              torch::stable::Tensor target,
                                              std::optional<torch::stable::Tensor> class_weight,
                                              torch::stable::Tensor weight, torch::stable::Tensor statistics,
                                              int64_t reduction, int64_t ignore_index, double label_smoothing);

}  // namespace biasloss
