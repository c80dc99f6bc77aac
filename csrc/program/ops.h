// The operator biasloss_ext::program: see biasloss_ext/ops/program/op.py.
#pragma once

#include <vector>

#include "../op_types.h"

namespace biasloss {

Tensor program_cpu(Tensor x, std::vector<Tensor> constants, std::vector<int64_t> code);

}  // namespace biasloss
