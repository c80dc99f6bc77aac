// The activations of the mobile networks and their derivatives, with torch's values at the kinks. For scalars, on CPUs
// and GPUs; csrc/simd/activation.h has the same for vectors.
#pragma once

#include <cmath>
#include <type_traits>

#include "activation_names.h"
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

template <Activation activation, class T>
BIASLOSS_HOST_DEVICE T activate(T u) {
  if constexpr (activation == Activation::relu) return u < T(0) ? T(0) : u;
  if constexpr (activation == Activation::relu6) return clamp_between(u, T(0), T(6));
  if constexpr (activation == Activation::hardswish) return u * clamp_between(u + T(3), T(0), T(6)) / T(6);
  if constexpr (activation == Activation::silu) return u * logistic(u);
  if constexpr (activation == Activation::hardsigmoid) return clamp_between(u + T(3), T(0), T(6)) / T(6);
  if constexpr (activation == Activation::sigmoid) return logistic(u);
  if constexpr (activation == Activation::gelu) return u * normal(u).below;
  if constexpr (activation == Activation::gelu_tanh) return u * distribution_of_gelu_tanh(u).below;
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
  if constexpr (activation == Activation::gelu) {
    const Distribution<T> of = normal(u);
    return of.below + u * of.density;
  }
  if constexpr (activation == Activation::gelu_tanh) {
    const Distribution<T> of = distribution_of_gelu_tanh(u);
    return of.below + u * of.density;
  }
  return T(1);
}

}  // namespace biasloss
