// The activations: names, numbers and formulas, for CPUs and CUDA.
#pragma once

#include <cmath>
#include <limits>

#include "macros.h"
#include "normal_tail.h"

namespace biasloss {

// OP(name, gate) for every activation, in the order of their numbers, which are those of biasloss_ext/ops/maps.py. An
// activation is its gate g, alone or times the input u:
//   line(use, offset, low, high, slope): g = slope * clamp(u + offset, low, high)
//   smooth(use, curve, linear, cubic): g is a function below, in distribution_of; linear and cubic are of logistic
#define BIASLOSS_ACTIVATIONS(OP)                                         \
  OP(identity, line<Acc>(GateUse::alone, 0, -kUnbounded, kUnbounded, 1)) \
  OP(relu, line<Acc>(GateUse::alone, 0, 0, kUnbounded, 1))               \
  OP(relu6, line<Acc>(GateUse::alone, 0, 0, 6, 1))                       \
  OP(hardswish, line<Acc>(GateUse::times_input, 3, 0, 6, 1.0 / 6))       \
  OP(silu, smooth<Acc>(GateUse::times_input, Curve::logistic, 1, 0))     \
  OP(hardsigmoid, line<Acc>(GateUse::alone, 3, 0, 6, 1.0 / 6))           \
  OP(sigmoid, smooth<Acc>(GateUse::alone, Curve::logistic, 1, 0))        \
  OP(gelu, smooth<Acc>(GateUse::times_input, Curve::normal))             \
  OP(gelu_tanh, smooth<Acc>(GateUse::times_input, Curve::logistic, kGeluLinear, kGeluCubic))

enum class Activation : int {
#define BIASLOSS_ENUMERATOR(name, gate) name,
  BIASLOSS_ACTIVATIONS(BIASLOSS_ENUMERATOR)
#undef BIASLOSS_ENUMERATOR
};

enum class Curve : int { line, logistic, normal };
enum class GateUse : int { alone, times_input };

// The gate of an activation as numbers, which CUDA kernels take at run time and CPU kernels at compile time.
template <class Acc>
struct Gate {
  Curve curve;
  bool times_input;
  Acc offset, low, high, slope;
  // act'(u) of a line: 0 up to first_kink, gradient_slope * u + gradient_offset between the kinks, gradient_above from
  // the second.
  Acc first_kink, second_kink, gradient_slope, gradient_offset, gradient_above;
  Acc linear, cubic;
};

constexpr double kUnbounded = std::numeric_limits<double>::infinity();

template <class Acc>
constexpr Gate<Acc> line(GateUse use, double offset, double low, double high, double slope) {
  const bool times_input = use == GateUse::times_input;
  const double gradient_slope = times_input ? 2 * slope : 0, gradient_offset = times_input ? slope * offset : slope;
  const double above = times_input ? slope * high : (high == kUnbounded ? slope : 0);
  return {Curve::line,
          times_input,
          Acc(offset),
          Acc(low),
          Acc(high),
          Acc(slope),
          Acc(low - offset),
          Acc(high - offset),
          Acc(gradient_slope),
          Acc(gradient_offset),
          Acc(above),
          0,
          0};
}

template <class Acc>
constexpr Gate<Acc> smooth(GateUse use, Curve curve, double linear = 0, double cubic = 0) {
  return {curve, use == GateUse::times_input, 0, 0, 0, 0, 0, 0, 0, 0, 0, Acc(linear), Acc(cubic)};
}

template <class Acc>
constexpr Gate<Acc> gate_of(Activation activation) {
  switch (activation) {
#define BIASLOSS_CASE(name, gate) \
  case Activation::name:          \
    return gate;
    BIASLOSS_ACTIVATIONS(BIASLOSS_CASE)
#undef BIASLOSS_CASE
  }
  return line<Acc>(GateUse::alone, 0, -kUnbounded, kUnbounded, 1);
}

// Operations of the formulas below: on a number here, on a vector in csrc/simd/activation.h.
struct NumberMath {
  static constexpr bool kGateIsConstant = false;
  template <class T>
  using Number = T;
  template <class T>
  static BIASLOSS_HOST_DEVICE T clamp(T x, T low, T high) {
    return x < low ? low : (x > high ? high : x);  // keeps a NaN
  }
  template <class T>
  static BIASLOSS_HOST_DEVICE T exponential(T x) {
    return std::exp(x);
  }
  static BIASLOSS_HOST_DEVICE double erfc(double x) { return std::erfc(x); }
};

// A distribution function at u, and its derivative: a smooth gate.
template <class V>
struct Distribution {
  V below, density;
};

template <class Math, class V>
BIASLOSS_HOST_DEVICE V logistic(V u) {
  const V one = V{} + 1;
  return one / (one + Math::exponential(-u));
}

template <class Math, class V>
BIASLOSS_HOST_DEVICE Distribution<V> normal(V u) {
  using Number = typename Math::template Number<V>;
  const V zero{};
  if constexpr (sizeof(Number) == sizeof(float)) {
    const V size = u < zero ? -u : u, end = zero + Number(kEndOfTail), a = size > end ? end : size;  // keeps a NaN
    const V e = Math::exponential(a * a * Number(-0.5)), tail = e * normal_tail_ratio(a);
    return {u < zero ? tail : Number(1) - tail, e * Number(kDensityAtZero)};
  } else {
    return {Math::erfc(u * Number(-kSqrtHalf)) * Number(0.5),
            Math::exponential(u * u * Number(-0.5)) * Number(kDensityAtZero)};
  }
}

// logistic(u * (linear + cubic * u^2)). Where it is 0 or 1, u may be too large for its cube: the bound is far from any
// other u.
// The 3 multiplies the square: its product with cubic would stay in a register throughout a kernel's loop.
template <class Math, class V, class Number>
BIASLOSS_HOST_DEVICE Distribution<V> logistic_of_cubic(V u, Number linear, Number cubic) {
  const V zero{}, bounded = Math::clamp(u, zero - Number(1e4), zero + Number(1e4)), square = bounded * bounded;
  const V v = bounded * (linear + cubic * square), slope = linear + cubic * (Number(3) * square);
  if constexpr (Math::kGateIsConstant) {  // without the cancellation in 1 - below, which the slope multiplies
    const V e = Math::exponential(v < zero ? v : -v), above = Number(1) / (Number(1) + e);
    return {v < zero ? e * above : above, e * above * above * slope};
  }
  const V below = logistic<Math>(v);
  return {below, below * (Number(1) - below) * slope};
}

template <class Math, class V, class Number>
BIASLOSS_HOST_DEVICE Distribution<V> distribution_of(const Gate<Number>& gate, V u) {
  if (gate.curve == Curve::normal) return normal<Math>(u);
  if (Math::kGateIsConstant && gate.cubic == 0) {
    const V below = logistic<Math>(u * gate.linear);
    return {below, below * (Number(1) - below) * gate.linear};
  }
  return logistic_of_cubic<Math>(u, gate.linear, gate.cubic);
}

// Calls f with the activation as a compile-time constant: f(ActivationConstant<a>()).
template <Activation a>
struct ActivationConstant {
  static constexpr Activation value = a;
};

template <class F>
auto with_activation(Activation activation, F&& f) {
  switch (activation) {
#define BIASLOSS_CASE(name, gate) \
  case Activation::name:          \
    return f(ActivationConstant<Activation::name>());
    BIASLOSS_ACTIVATIONS(BIASLOSS_CASE)
#undef BIASLOSS_CASE
  }
  return f(ActivationConstant<Activation::identity>());
}

}  // namespace biasloss
