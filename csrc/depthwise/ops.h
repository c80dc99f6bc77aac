// The operators biasloss_ext::depthwise and biasloss_ext::depthwise_backward: see biasloss_ext/ops/depthwise/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (y, statistics)
using Depthwise = std::tuple<Tensor, Tensor>(Tensor x, Tensor weight, OptionalTensor affine, int64_t activation,
                                             int64_t stride, bool same_padding, bool want_statistics,
                                             OptionalTensor norm_weight, OptionalTensor norm_bias,
                                             OptionalTensor running_mean, OptionalTensor running_var,
                                             OptionalTensor num_batches_tracked, double momentum, double eps);
Depthwise depthwise_cpu, depthwise_cuda;

// (grad_x, grad_weight, coefficients)
using DepthwiseBackward = std::tuple<Tensor, Tensor, Tensor>(Tensor x, Tensor weight, OptionalTensor grad,
                                                             OptionalTensor pool_grad, OptionalTensor y,
                                                             OptionalTensor y_affine, OptionalTensor y_coefficients,
                                                             int64_t y_activation, OptionalTensor affine,
                                                             OptionalTensor moments, int64_t activation, int64_t stride,
                                                             bool same_padding, OptionalTensor residual_grad,
                                                             bool want_x, bool want_weight, double eps, bool frozen);
DepthwiseBackward depthwise_backward_cpu, depthwise_backward_cuda;

}  // namespace biasloss
