// Activations chosen at run time without a switch: all of them but the smooth ones are a clamped line, alone or times
// the input. One kernel so serves every activation, for a few instructions more than the plainest of them needs.
#pragma once

#include <type_traits>

#include "../cuda/portable.cuh"
#include "../math/activations.h"

namespace biasloss {

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
  return NumberMath::clamp(x, low, high);
}

// Calls f(smooth) with the property of the gate as a constant: the branch is outside of what f does then.
template <class Acc, class F>
__device__ __forceinline__ void with_smoothness(const Gate<Acc>& gate, F&& f) {
  if (gate.curve != Curve::line)
    f(std::true_type());
  else
    f(std::false_type());
}

// u becomes h.
template <bool smooth, class Acc, unsigned count>
__device__ __forceinline__ void activate(const Gate<Acc>& gate, Acc (&u)[count]) {
  if constexpr (smooth) {
#pragma unroll
    for (unsigned i = 0; i < count; ++i)
      u[i] = distribution_of<NumberMath>(gate, u[i]).below * (gate.times_input ? u[i] : Acc(1));
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
      const Distribution<Acc> of = distribution_of<NumberMath>(gate, u[i]);
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
