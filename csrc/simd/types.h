// 16-bit elements as plain bits: what crosses the line between torch and the SIMD kernels.
#pragma once

#include <cstdint>

namespace biasloss {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace biasloss
