// The operators biasloss_ext::pointwise and biasloss_ext::pointwise_backward; see biasloss_ext/ops/pointwise/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (y, statistics)
std::tuple<Tensor, Tensor> pointwise_cpu(Tensor x, Tensor weight, OptionalTensor affine, int64_t activation,
                                         OptionalTensor gate, OptionalTensor bias, int64_t output_activation,
                                         OptionalTensor residual, bool want_statistics, OptionalTensor norm_weight,
                                         OptionalTensor norm_bias, OptionalTensor running_mean,
                                         OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                         double momentum, double eps);

// (grad_x, grad_weight, gate_grad, sums, coefficients)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_backward_cpu(
    Tensor grad, Tensor x, Tensor weight, OptionalTensor y, OptionalTensor y_coefficients, OptionalTensor affine,
    OptionalTensor moments, int64_t activation, OptionalTensor gate, OptionalTensor residual_grad, bool any_origin,
    bool want_x, bool want_weight, double eps, bool frozen);

}  // namespace biasloss
