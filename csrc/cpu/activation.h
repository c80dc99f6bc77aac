// The number of an activation, checked once on the way in: inside, with_activation() takes an unknown one for the
// identity. For the launchers of CUDA kernels, too.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "../math/activations.h"

namespace biasloss {

inline constexpr const char* kActivationNames[] = {
#define BIASLOSS_NAME(name, gate) #name,
    BIASLOSS_ACTIVATIONS(BIASLOSS_NAME)
#undef BIASLOSS_NAME
};
inline constexpr int64_t kActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

inline std::string numbered_activations() {
  std::string text;
  for (int64_t number = 0; number < kActivations; ++number)
    text += (number == 0 ? "" : ", ") + std::to_string(number) + " (" + kActivationNames[number] + ")";
  return text;
}

inline Activation checked_activation(int64_t number, const char* name) {
  STD_TORCH_CHECK(number >= 0 && number < kActivations, name, ": expected one of ", numbered_activations(), ", got ",
                  number);
  return static_cast<Activation>(number);
}

}  // namespace biasloss
