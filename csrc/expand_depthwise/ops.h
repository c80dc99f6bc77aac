// The operators biasloss_ext::expand_depthwise, expand_depthwise_activate and expand_depthwise_backward: see
// biasloss_ext/ops/expand_depthwise/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (y, statistics)
std::tuple<Tensor, Tensor> expand_depthwise_cpu(Tensor x, Tensor expand_weight, Tensor affine, Tensor weight,
                                                int64_t activation, int64_t stride, bool same_padding,
                                                bool want_statistics, OptionalTensor norm_weight,
                                                OptionalTensor norm_bias, OptionalTensor running_mean,
                                                OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                double momentum, double eps);

// (h, pooled)
std::tuple<Tensor, Tensor> expand_depthwise_activate_cpu(Tensor x, Tensor expand_weight, Tensor affine, Tensor weight,
                                                         Tensor y_affine, int64_t activation, int64_t stride,
                                                         bool same_padding, int64_t y_activation, bool want_pool);

// (grad_x, grad_expand, grad_weight, coefficients)
std::tuple<Tensor, Tensor, Tensor, Tensor> expand_depthwise_backward_cpu(
    Tensor x, Tensor x_mean, Tensor expand_weight, Tensor affine, Tensor moments, Tensor weight, Tensor y,
    Tensor y_affine, Tensor y_coefficients, OptionalTensor grad, OptionalTensor pool_grad, int64_t y_activation,
    int64_t activation, int64_t stride, bool same_padding, double eps, bool frozen);

}  // namespace biasloss
