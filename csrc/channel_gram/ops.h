// The operators biasloss_ext::channel_gram and channel_gram_product; see biasloss_ext/ops/expand_depthwise/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (mean, gram): (C,) and (C, C).
std::tuple<Tensor, Tensor> channel_gram_cpu(Tensor x);

// (exact, moments): (K, C) and (2, K).
std::tuple<Tensor, Tensor> channel_gram_product_cpu(Tensor x, Tensor mean, Tensor gram, Tensor weight,
                                                    Tensor weight_gram);

}  // namespace biasloss
