// The operators biasloss_ext::pool_variance and its backward: see biasloss_ext/ops/pool_variance/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (pooled, variance)
std::tuple<Tensor, Tensor> pool_variance_cpu(Tensor x, OptionalTensor affine, int64_t activation, bool want_variance);

// (grad_x, coefficients)
std::tuple<Tensor, Tensor> pool_variance_backward_cpu(Tensor pool_grad, Tensor x, OptionalTensor affine,
                                                      OptionalTensor moments, int64_t activation, double eps,
                                                      bool frozen);

}  // namespace biasloss
