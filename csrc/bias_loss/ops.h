// The operators biasloss_ext::bias_loss and biasloss_ext::bias_loss_backward, one function a device.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (loss, weight, statistics); statistics.h has what is in the last.
using BiasLossResult = std::tuple<Tensor, Tensor, Tensor>;
using BiasLoss = BiasLossResult(OptionalTensor features, OptionalTensor variance, OptionalTensor extrema, Tensor output,
                                Tensor target, OptionalTensor class_weight, OptionalTensor running_min, double alpha,
                                double beta, bool update_running_min, int64_t reduction, int64_t ignore_index,
                                double label_smoothing);
BiasLoss bias_loss_cpu, bias_loss_cuda;

using BiasLossBackward = Tensor(Tensor grad_loss, Tensor output, Tensor target, OptionalTensor class_weight,
                                Tensor weight, Tensor statistics, int64_t reduction, int64_t ignore_index,
                                double label_smoothing);
BiasLossBackward bias_loss_backward_cpu, bias_loss_backward_cuda;

}  // namespace biasloss
