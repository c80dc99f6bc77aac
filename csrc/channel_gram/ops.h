// The operator biasloss_ext::channel_gram; see biasloss_ext/ops/expand_depthwise/op.py.
#pragma once

#include "../op_types.h"

namespace biasloss {

// (mean, gram): (C,) and (C, C).
std::tuple<Tensor, Tensor> channel_gram_cpu(Tensor x);

}  // namespace biasloss
