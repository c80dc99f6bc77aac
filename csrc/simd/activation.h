// The activations and their derivatives for vectors, with torch's values at the kinks. For *_simd.cpp files only.
#pragma once

#include <type_traits>

#include "../math/activations.h"
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

// Of formulas in csrc/math/activations.h, on vectors.
struct VectorMath {
  static constexpr bool kGateIsConstant = true;
  template <class V>
  using Number = typename std::remove_cv<__typeof__(V{}[0] + 0)>::type;
  template <class V>
  static inline V clamp(const V& x, const V& low, const V& high) {
    return between(x, low, high);
  }
  template <class V>
  static inline V exponential(const V& x) {
    return BIASLOSS_ISA::exponential(x);
  }
  static inline DoubleVector erfc(DoubleVector x) {
    for (int i = 0; i < kDoubleLanes; ++i) x[i] = __builtin_erfc(x[i]);
    return x;
  }
};

template <Activation activation, class V>
inline constexpr auto kGate = gate_of<VectorMath::Number<V>>(activation);

template <Activation activation, class V>
inline V smooth_value(const V& u) {
  constexpr auto gate = kGate<activation, V>;
  const V below = distribution_of<VectorMath>(gate, u).below;
  return gate.times_input ? u * below : below;
}

template <Activation activation, class V>
inline V smooth_derivative(const V& u) {
  constexpr auto gate = kGate<activation, V>;
  const Distribution<V> of = distribution_of<VectorMath>(gate, u);
  return gate.times_input ? of.below + u * of.density : of.density;
}

// All but the plain logistic function are calls: in line, every kernel would hold copies of them, and a call costs
// little compared with what it computes.
template <Activation activation, class V>
inline constexpr bool kIsCall = kGate<activation, V>.curve != Curve::logistic || kGate<activation, V>.cubic != 0;

template <Activation activation, class V>
[[gnu::noinline]] V called_value(V u) {
  return smooth_value<activation>(u);
}

template <Activation activation, class V>
[[gnu::noinline]] V called_derivative(V u) {
  return smooth_derivative<activation>(u);
}

template <Activation activation, class V>
inline V activate(const V& u) {
  constexpr auto gate = kGate<activation, V>;
  if constexpr (gate.curve == Curve::line) {
    V h = u;
    if constexpr (gate.offset != 0) h = h + gate.offset;
    if constexpr (gate.low > -kUnbounded) h = at_least(h, V{} + gate.low);
    if constexpr (gate.high < kUnbounded) h = at_most(h, V{} + gate.high);
    if constexpr (gate.times_input) h = u * h;
    if constexpr (gate.slope != 1) h = h * gate.slope;
    return h;
  } else if constexpr (kIsCall<activation, V>) {
    return called_value<activation, V>(u);
  } else {
    return smooth_value<activation>(u);
  }
}

template <Activation activation, class V>
inline V derivative(const V& u) {
  constexpr auto gate = kGate<activation, V>;
  if constexpr (gate.curve == Curve::line) {
    const V zero = {}, first = zero + gate.first_kink, second = zero + gate.second_kink;
    const V above = zero + gate.gradient_above;
    V slope = zero + gate.gradient_offset;
    if constexpr (gate.gradient_slope != 0) slope = u * gate.gradient_slope + slope;
    if constexpr (gate.second_kink < kUnbounded) slope = u < second ? slope : above;
    if constexpr (gate.first_kink > -kUnbounded) slope = u <= first ? zero : slope;
    return slope;
  } else if constexpr (kIsCall<activation, V>) {
    return called_derivative<activation, V>(u);
  } else {
    return smooth_derivative<activation>(u);
  }
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
