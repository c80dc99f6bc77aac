// The operators biasloss_ext::squeeze_excite and its backward: see biasloss_ext/ops/squeeze_excite/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (gate, reduced, expanded)
std::tuple<Tensor, Tensor, Tensor> squeeze_excite_cpu(Tensor pooled, Tensor reduce_weight, Tensor reduce_bias,
                                                      Tensor expand_weight, Tensor expand_bias, int64_t activation,
                                                      int64_t gate_activation);

// (pool_grad, reduce_weight_grad, reduce_bias_grad, expand_weight_grad, expand_bias_grad, coefficients)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward_cpu(
    Tensor gate_grad, Tensor pooled, Tensor reduced, Tensor expanded, Tensor reduce_weight, Tensor expand_weight,
    int64_t activation, int64_t gate_activation, OptionalTensor sums, OptionalTensor affine, OptionalTensor moments,
    int64_t positions, double eps, bool frozen);

}  // namespace biasloss
