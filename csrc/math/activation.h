// The activations of the mobile networks and their derivatives, with torch's values at the kinks. For scalars, on CPUs
// and GPUs; csrc/simd/activation.h has the same for vectors.
#pragma once

#include <cmath>

#include "activation_names.h"
#include "macros.h"

namespace biasloss {

template <class T>
BIASLOSS_HOST_DEVICE T clamp_between(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);  // keeps a NaN
}

template <class T>
BIASLOSS_HOST_DEVICE T logistic(T u) {
  return T(1) / (T(1) + std::exp(-u));
}

template <Activation activation, class T>
BIASLOSS_HOST_DEVICE T activate(T u) {
  if constexpr (activation == Activation::relu) return u < T(0) ? T(0) : u;
  if constexpr (activation == Activation::relu6) return clamp_between(u, T(0), T(6));
  if constexpr (activation == Activation::hardswish) return u * clamp_between(u + T(3), T(0), T(6)) / T(6);
  if constexpr (activation == Activation::silu) return u * logistic(u);
  if constexpr (activation == Activation::hardsigmoid) return clamp_between(u + T(3), T(0), T(6)) / T(6);
  if constexpr (activation == Activation::sigmoid) return logistic(u);
  return u;
}

template <Activation activation, class T>
BIASLOSS_HOST_DEVICE T derivative(T u) {
  if constexpr (activation == Activation::relu) return u > T(0) ? T(1) : T(0);
  if constexpr (activation == Activation::relu6) return u > T(0) && u < T(6) ? T(1) : T(0);
  if constexpr (activation == Activation::hardswish) return u <= T(-3) ? T(0) : (u < T(3) ? u / T(3) + T(0.5) : T(1));
  if constexpr (activation == Activation::silu) {
    const T s = logistic(u);
    return s * (T(1) + u * (T(1) - s));
  }
  if constexpr (activation == Activation::hardsigmoid) return u > T(-3) && u < T(3) ? T(1) / T(6) : T(0);
  if constexpr (activation == Activation::sigmoid) {
    const T s = logistic(u);
    return s * (T(1) - s);
  }
  return T(1);
}

}  // namespace biasloss
