// Activations chosen at run time without a switch: all of them but the smooth ones are a clamped line, alone or times
// the input. One kernel so serves every activation, for a few instructions more than the plainest of them needs.
#pragma once

#include <limits>
#include <type_traits>

#include "../cuda/portable.cuh"
#include "../math/activation_names.h"
#include "../math/distributions.h"

namespace biasloss {

// h = g or u * g, g = slope * clamp(u + offset, low, high); where smooth, g is the normal distribution function of u or
// logistic(u * (linear + cubic * u^2)).
// act'(u) = 0 up to first_kink, gradient_slope * u + gradient_offset between the kinks, gradient_above from the second.
template <class Acc>
struct Gate {
  bool smooth;
  bool times_input;
  Acc offset, low, high, slope;
  Acc first_kink, second_kink, gradient_slope, gradient_offset, gradient_above;
  bool normal = false;
  Acc linear = 0, cubic = 0;
};

template <class Acc>
Gate<Acc> smooth_gate(bool times_input, bool normal, Acc linear, Acc cubic) {
  return {true, times_input, 0, 0, 0, 0, 0, 0, 0, 0, 0, normal, linear, cubic};
}

template <class Acc>
Gate<Acc> gate_of(Activation activation) {
  const Acc infinity = std::numeric_limits<Acc>::infinity();
  const Acc third = Acc(1) / Acc(3), sixth = Acc(1) / Acc(6), half = Acc(0.5);
  switch (activation) {
    case Activation::relu:
      return {false, false, 0, 0, infinity, 1, 0, infinity, 0, 1, 1};
    case Activation::relu6:
      return {false, false, 0, 0, 6, 1, 0, 6, 0, 1, 0};
    case Activation::hardswish:
      return {false, true, 3, 0, 6, sixth, -3, 3, third, half, 1};
    case Activation::hardsigmoid:
      return {false, false, 3, 0, 6, sixth, -3, 3, 0, sixth, 0};
    case Activation::silu:
      return smooth_gate<Acc>(true, false, 1, 0);
    case Activation::sigmoid:
      return smooth_gate<Acc>(false, false, 1, 0);
    case Activation::gelu:
      return smooth_gate<Acc>(true, true, 0, 0);
    case Activation::gelu_tanh:
      return smooth_gate<Acc>(true, false, Acc(kGeluLinear), Acc(kGeluCubic));
    default:
      return {false, false, 0, -infinity, infinity, 1, -infinity, infinity, 0, 1, 1};
  }
}

// In two instructions, where there are such that keep a NaN.
template <class Acc>
__device__ __forceinline__ Acc clamp_on_device(Acc x, Acc low, Acc high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<Acc, float>::value) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
    return x;
  }
#endif
  return clamp_between(x, low, high);
}

// Calls f(smooth) with the property of the gate as a constant: the branch is outside of what f does then.
template <class Acc, class F>
__device__ __forceinline__ void with_smoothness(const Gate<Acc>& gate, F&& f) {
  if (gate.smooth)
    f(std::true_type());
  else
    f(std::false_type());
}

template <class Acc>
__device__ __forceinline__ Distribution<Acc> distribution_of(const Gate<Acc>& gate, Acc u) {
  if (gate.normal) return normal(u);
  return logistic_of_cubic(u, gate.linear, gate.cubic);
}

// u becomes h.
template <bool smooth, class Acc, unsigned count>
__device__ __forceinline__ void activate(const Gate<Acc>& gate, Acc (&u)[count]) {
  if constexpr (smooth) {
#pragma unroll
    for (unsigned i = 0; i < count; ++i) u[i] = distribution_of(gate, u[i]).below * (gate.times_input ? u[i] : Acc(1));
  } else {
#pragma unroll
    for (unsigned i = 0; i < count; ++i) {
      const Acc g = clamp_on_device(u[i] + gate.offset, gate.low, gate.high) * gate.slope;
      u[i] = gate.times_input ? u[i] * g : g;
    }
  }
}

// dh becomes dh * act'(u).
template <bool smooth, class Acc, unsigned count>
__device__ __forceinline__ void multiply_by_derivative(const Gate<Acc>& gate, const Acc (&u)[count], Acc (&dh)[count]) {
  if constexpr (smooth) {
#pragma unroll
    for (unsigned i = 0; i < count; ++i) {
      const Distribution<Acc> of = distribution_of(gate, u[i]);
      dh[i] *= gate.times_input ? of.below + u[i] * of.density : of.density;
    }
  } else {
#pragma unroll
    for (unsigned i = 0; i < count; ++i) {
      const Acc between = u[i] * gate.gradient_slope + gate.gradient_offset;
      const Acc above = u[i] < gate.second_kink ? between : gate.gradient_above;
      dh[i] *= u[i] <= gate.first_kink ? Acc(0) : above;
    }
  }
}

}  // namespace biasloss
