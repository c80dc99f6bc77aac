// The activations and their derivatives for vectors, with torch's values at the kinks. For *_simd.cpp files only.
#pragma once

#include "../math/activation_names.h"
#include "../math/normal_tail.h"
#include "vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {

// A constant that the compiler cannot see: of a comparison with one that it sees, gcc makes a mask and a masked move
// where a maximum or a minimum is meant.
template <class V>
inline V hidden(V v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// Both keep a NaN in x.
template <class V>
inline V at_least(const V& x, const V& low) {
  const V bound = hidden(low);
  return x < bound ? bound : x;
}
template <class V>
inline V at_most(const V& x, const V& high) {
  const V bound = hidden(high);
  return x > bound ? bound : x;
}

template <class V>
inline V between(const V& x, const V& low, const V& high) {
  return at_most(at_least(x, low), high);
}

template <class V>
inline V one_sixth() {
  return V{} + (V{}[0] + 1) / 6;
}

template <class V>
inline V logistic(const V& u) {
  const V one = V{} + 1;
  return one / (one + exponential(-u));
}

// The normal distribution function at u, and its density.
template <class V>
struct Normal {
  V below, density;
};

inline Normal<FloatVector> normal(const FloatVector& u) {
  const FloatVector zero = {}, a = at_most(u < zero ? -u : u, zero + kEndOfTail);
  const FloatVector e = exponential(a * a * -0.5f), tail = e * normal_tail_ratio(a);
  return {u < zero ? tail : 1.0f - tail, e * float(kDensityAtZero)};
}

inline Normal<DoubleVector> normal(const DoubleVector& u) {
  DoubleVector below;
  for (int i = 0; i < kDoubleLanes; ++i) below[i] = 0.5 * __builtin_erfc(u[i] * -kSqrtHalf);
  return {below, exponential(u * u * -0.5) * kDensityAtZero};
}

// The forms of GELU are calls: in line, every kernel would hold copies of them, and a call is little beside what it
// computes.
template <class V>
[[gnu::noinline]] V gelu(V u) {
  return u * normal(u).below;
}

template <class V>
[[gnu::noinline]] V gelu_derivative(V u) {
  const Normal<V> of = normal(u);
  return of.below + u * of.density;
}

template <class V>
[[gnu::noinline]] V gelu_tanh(V u) {
  using Scalar = __typeof__(u[0] + 0);
  return u * logistic(u * (Scalar(kGeluLinear) + Scalar(kGeluCubic) * u * u));
}

template <class V>
[[gnu::noinline]] V gelu_tanh_derivative(V u) {
  using Scalar = __typeof__(u[0] + 0);
  // Behind the bounds the logistic function is 0 or 1, and the square of u might be infinite.
  const V zero = {}, one = zero + 1, bounded = between(u, zero - 25, zero + 25), square = bounded * bounded;
  const V v = bounded * (Scalar(kGeluLinear) + Scalar(kGeluCubic) * square);
  const V e = exponential(v < zero ? v : -v), above = one / (one + e);
  const V slope = Scalar(kGeluLinear) + Scalar(3 * kGeluCubic) * square;
  return (v < zero ? e * above : above) + u * (e * above * above * slope);
}

template <Activation activation, class V>
inline V activate(const V& u) {
  const V zero = {}, three = V{} + 3, six = V{} + 6;
  if constexpr (activation == Activation::relu) return at_least(u, zero);
  if constexpr (activation == Activation::relu6) return between(u, zero, six);
  if constexpr (activation == Activation::hardswish) return u * between(u + three, zero, six) * one_sixth<V>();
  if constexpr (activation == Activation::silu) return u * logistic(u);
  if constexpr (activation == Activation::hardsigmoid) return between(u + three, zero, six) * one_sixth<V>();
  if constexpr (activation == Activation::sigmoid) return logistic(u);
  if constexpr (activation == Activation::gelu) return gelu<V>(u);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh<V>(u);
  return u;
}

template <Activation activation, class V>
inline V derivative(const V& u) {
  const V zero = {}, one = V{} + 1, three = V{} + 3, six = V{} + 6;
  if constexpr (activation == Activation::relu) return u > zero ? one : zero;
  if constexpr (activation == Activation::relu6) return (u > zero) & (u < six) ? one : zero;
  if constexpr (activation == Activation::hardswish) {
    const V between_kinks = u * (one_sixth<V>() + one_sixth<V>()) + three * one_sixth<V>();
    return u <= -three ? zero : (u < three ? between_kinks : one);
  }
  if constexpr (activation == Activation::silu) {
    const V s = logistic(u);
    return s * (one + u * (one - s));
  }
  if constexpr (activation == Activation::hardsigmoid) return (u > -three) & (u < three) ? one_sixth<V>() : zero;
  if constexpr (activation == Activation::sigmoid) {
    const V s = logistic(u);
    return s * (one - s);
  }
  if constexpr (activation == Activation::gelu) return gelu_derivative<V>(u);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh_derivative<V>(u);
  return one;
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
