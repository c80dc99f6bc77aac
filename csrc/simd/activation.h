// The activations of csrc/math/activation.h and their derivatives for vectors. For *_simd.cpp files only.
#pragma once

#include "../math/activation_names.h"
#include "vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {

template <class V>
inline V between(V x, const V& low, const V& high) {
  x = x < low ? low : x;
  return x > high ? high : x;
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

template <Activation activation, class V>
inline V activate(const V& u) {
  const V zero = {}, three = V{} + 3, six = V{} + 6;
  if constexpr (activation == Activation::relu) return u < zero ? zero : u;
  if constexpr (activation == Activation::relu6) return between(u, zero, six);
  if constexpr (activation == Activation::hardswish) return u * between(u + three, zero, six) * one_sixth<V>();
  if constexpr (activation == Activation::silu) return u * logistic(u);
  if constexpr (activation == Activation::hardsigmoid) return between(u + three, zero, six) * one_sixth<V>();
  if constexpr (activation == Activation::sigmoid) return logistic(u);
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
  return one;
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
