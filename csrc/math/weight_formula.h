// w_i = exp(alpha * v_i) - beta of Abrahamyan et al., "Bias Loss for Mobile Neural Networks", ICCV 2021.
#pragma once

#include "macros.h"

namespace biasloss {

// Beyond this exponent the weight is capped: exp(60) = 1e26 still leaves room for the loss in float32.
constexpr double kLargestExponent = 60.0;

// For numbers and for vectors of them, each with an exponential function of its own.
template <class Value, class T, class Exponential>
BIASLOSS_HOST_DEVICE Value weight_formula(Value normalized_variance, T alpha, T beta, const Exponential& exponential) {
  const Value exponent = alpha * normalized_variance, most = Value{} + static_cast<T>(kLargestExponent);
  return exponential(exponent > most ? most : exponent) - beta;
}

}  // namespace biasloss
