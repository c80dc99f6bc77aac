#pragma once

#include <pybind11/stl.h>

#include <type_traits>

#include "bindings.h"
#include "depthwise/cuda_plan.h"
#include "depthwise/finish.cuh"

namespace cudasim {

// (N, H, W, C), dense
struct MapShape {
  int64_t samples, rows, columns, channels;
  explicit MapShape(const Array& a)
      : samples(a.shape(0)), rows(a.shape(1)), columns(a.shape(2)), channels(a.shape(3)) {}
};

// What the plan is made for, and how the simulator runs it.
struct Machine {
  int multiprocessors;
  int64_t shared_bytes;
  Schedule schedule;
};

// Calls f(kernel, stride) with compile-time constants.
template <class F>
void with_kernel_and_stride(int kernel, int stride, F&& f) {
  const auto with_stride = [&](auto k) {
    if (stride == 1) return f(k, std::integral_constant<int, 1>());
    return f(k, std::integral_constant<int, 2>());
  };
  if (kernel == 3) return with_stride(std::integral_constant<int, 3>());
  if (kernel == 5) return with_stride(std::integral_constant<int, 5>());
  return with_stride(std::integral_constant<int, 7>());
}

// Whether whole vectors of channels can be had of all these maps.
template <class T>
bool vectors_possible(int64_t channels, std::initializer_list<const T*> maps) {
  for (const T* map : maps)
    if (reinterpret_cast<uintptr_t>(map) % 16 != 0) return false;
  return channels % int64_t(16 / sizeof(T)) == 0;
}

}  // namespace cudasim
