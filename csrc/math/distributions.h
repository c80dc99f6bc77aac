// What smooth activations are made of, for scalars; csrc/simd/activation.h has the same for vectors.
#pragma once

#include <cmath>
#include <type_traits>

#include "macros.h"
#include "normal_tail.h"

namespace biasloss {

template <class T>
BIASLOSS_HOST_DEVICE T clamp_between(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);  // keeps a NaN
}

template <class T>
BIASLOSS_HOST_DEVICE T logistic(T u) {
  return T(1) / (T(1) + std::exp(-u));
}

// A distribution function at u, and its derivative: what the smooth activations are, alone or times u.
template <class T>
struct Distribution {
  T below, density;
};

template <class T>
BIASLOSS_HOST_DEVICE Distribution<T> normal(T u) {
  if constexpr (std::is_same<T, float>::value) {
    const T size = u < T(0) ? -u : u, a = size > T(kEndOfTail) ? T(kEndOfTail) : size;  // keeps a NaN
    const T e = std::exp(a * a * T(-0.5)), tail = e * normal_tail_ratio(a);
    return {u < T(0) ? tail : T(1) - tail, e * T(kDensityAtZero)};
  } else {
    return {T(0.5) * std::erfc(u * T(-kSqrtHalf)), std::exp(u * u * T(-0.5)) * T(kDensityAtZero)};
  }
}

// logistic(u * (linear + cubic * u^2)). Where it is 0 or 1, u may be too large for its cube: the bound is far from any
// other u.
// The 3 multiplies the square: its product with cubic would stay in a register throughout a kernel's loop.
template <class T>
BIASLOSS_HOST_DEVICE Distribution<T> logistic_of_cubic(T u, T linear, T cubic) {
  const T bounded = clamp_between(u, T(-1e4), T(1e4)), square = bounded * bounded;
  const T below = logistic(bounded * (linear + cubic * square));
  return {below, below * (T(1) - below) * (linear + cubic * (T(3) * square))};
}

template <class T>
BIASLOSS_HOST_DEVICE Distribution<T> distribution_of_gelu_tanh(T u) {
  return logistic_of_cubic(u, T(kGeluLinear), T(kGeluCubic));
}

}  // namespace biasloss
