// What the signatures of the ops are written in. Arguments come in the order of the schema.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace biasloss {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace biasloss
