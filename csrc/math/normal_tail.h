// The tail of the normal distribution, for scalars and for vectors of GCC's extension, on CPUs and GPUs.
#pragma once

#include "macros.h"

namespace biasloss {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kDensityAtZero = 0.39894228040143267794;  // 1 / sqrt(2 * pi)
// From here on both the tail and the density are 0 in float32.
constexpr float kEndOfTail = 15.0f;

// (1 - P(a)) * exp(a^2 / 2) for 0 <= a <= kEndOfTail, P the normal distribution: a quotient of polynomials that is off
// by at most 6e-9 of the value. Minimax in the relative error, found by Lawson's iteration; every coefficient is
// positive, so that no digits cancel.
template <class V>
BIASLOSS_HOST_DEVICE V normal_tail_ratio(const V& a) {
  V above = a * 4.116308299868771e-3f + 4.063321830383655e-2f;
  above = above * a + 0.1832351096725396f;
  above = above * a + 0.4382949070093559f;
  above = above * a + 0.5f;
  V below = a * 1.0317935027147649e-2f + 0.10185882098128052f;
  below = below * a + 0.46947055713258345f;
  below = below * a + 1.2025030156951593f;
  below = below * a + 1.6744747952889532f;
  below = below * a + 1.0f;
  return above / below;
}

// The tanh form of GELU is u * logistic(u * (kGeluLinear + kGeluCubic * u^2)), as 1 + tanh(v) = 2 * logistic(2 * v).
constexpr double kGeluLinear = 1.59576912160573071176;  // 2 * sqrt(2 / pi)
constexpr double kGeluCubic = 0.044715 * kGeluLinear;

}  // namespace biasloss
