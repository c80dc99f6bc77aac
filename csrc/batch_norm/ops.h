// The operators biasloss_ext::batch_norm_*: see biasloss_ext/ops/batch_norm/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

Tensor batch_norm_statistics_cpu(Tensor y, OptionalTensor norm_weight, OptionalTensor norm_bias,
                                 OptionalTensor running_mean, OptionalTensor running_var,
                                 OptionalTensor num_batches_tracked, double momentum, double eps);
Tensor batch_norm_affine_cpu(Tensor moments, int64_t count, OptionalTensor norm_weight, OptionalTensor norm_bias,
                             OptionalTensor running_mean, OptionalTensor running_var,
                             OptionalTensor num_batches_tracked, double momentum, double eps);
Tensor batch_norm_apply_cpu(Tensor y, Tensor affine, int64_t activation, OptionalTensor residual);
Tensor batch_norm_coefficients_cpu(Tensor grad, Tensor y, Tensor affine, Tensor moments, int64_t activation, double eps,
                                   bool frozen);
Tensor batch_norm_backward_cpu(Tensor grad, Tensor y, Tensor affine, Tensor coefficients, int64_t activation);

}  // namespace biasloss
