// The number of an activation, checked once on the way in: inside, with_activation() takes an unknown one for the
// identity. For the launchers of CUDA kernels, too.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../math/activation_names.h"

namespace biasloss {

inline Activation checked_activation(int64_t number, const char* name) {
  STD_TORCH_CHECK(number >= 0 && number <= int64_t(Activation::gelu_tanh), name,
                  ": expected 0 (identity), 1 (relu), 2 (relu6), 3 (hardswish), 4 (silu), 5 (hardsigmoid), "
                  "6 (sigmoid), 7 (gelu) or 8 (gelu_tanh), got ",
                  number);
  return static_cast<Activation>(number);
}

}  // namespace biasloss
