// What the launchers of both directions share: checks, dispatch to the compiled kernels, plans.
#pragma once

#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "../cpu/activation.h"
#include "../cpu/maps.h"
#include "../cuda/launch.h"
#include "../cuda/tensors.h"
#include "../cuda/vector_load.cuh"
#include "../op_types.h"
#include "cuda_plan.h"
#include "window_shift.h"

namespace biasloss {

struct DepthwiseShape {
  MapShape x;
  MapShape y;
  int64_t kernel, stride;
  int64_t row_shift, column_shift;
};

// Raises where the arguments that both directions have do not fit together.
inline DepthwiseShape depthwise_shape(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                                      bool same_padding) {
  const MapShape shape = map_shape(x, op);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) == shape.channels && weight.size(1) == 1 && weight.size(2) == weight.size(3),
      op, ": expected a weight of shape (", shape.channels, ", 1, k, k)");
  const int64_t kernel = weight.size(2);
  STD_TORCH_CHECK(kernel == 3 || kernel == 5 || kernel == 7, op, ": expected a kernel of 3, 5 or 7, got ", kernel);
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": expected a stride of 1 or 2, got ", stride);
  STD_TORCH_CHECK(weight.scalar_type() == accumulation_dtype(x.scalar_type()), op,
                  ": expected a weight of the accumulation dtype");
  STD_TORCH_CHECK(shape.positions() * shape.channels <= std::numeric_limits<int32_t>::max(), op,
                  ": a sample has too many elements: ", shape.positions() * shape.channels);
  const auto halved = [stride](int64_t size) { return (size + stride - 1) / stride; };
  return {shape,
          {shape.samples, shape.channels, halved(shape.height), halved(shape.width)},
          kernel,
          stride,
          window_shift(shape.height, stride, same_padding),
          window_shift(shape.width, stride, same_padding)};
}

// Raises unless an optional map has this shape and the dtype of x.
inline void check_map(const char* op, const char* name, const OptionalTensor& t, const MapShape& expected,
                      const Tensor& x) {
  if (!t.has_value()) return;
  const MapShape s = map_shape(*t, name);
  STD_TORCH_CHECK(s.samples == expected.samples && s.channels == expected.channels && s.height == expected.height &&
                      s.width == expected.width,
                  op, ": expected ", name, " of shape (", expected.samples, ", ", expected.channels, ", ",
                  expected.height, ", ", expected.width, "), got (", s.samples, ", ", s.channels, ", ", s.height, ", ",
                  s.width, ")");
  STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), op, ": expected ", name, " in the dtype of x");
}

// A channels_last map on the device of x.
inline Tensor new_map(const Tensor& x, const MapShape& s) {
  return torch::stable::empty({s.samples, s.channels, s.height, s.width}, x.scalar_type(), std::nullopt, x.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline bool aligned_to_vectors(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// Calls f(element, accumulator, kernel, stride): values of types and compile-time constants.
template <class F>
void with_depthwise_kernel(ScalarType dtype, int64_t kernel, int64_t stride, F&& f) {
  with_types(dtype, [&](auto element, auto accumulator) {
    const auto with_stride = [&](auto k) {
      if (stride == 1) return f(element, accumulator, k, std::integral_constant<int, 1>());
      return f(element, accumulator, k, std::integral_constant<int, 2>());
    };
    if (kernel == 3) return with_stride(std::integral_constant<int, 3>());
    if (kernel == 5) return with_stride(std::integral_constant<int, 5>());
    return with_stride(std::integral_constant<int, 7>());
  });
}

// As plan_depthwise(), which looks at thousands of cuts; of a shape once.
template <class Tiling>
DepthwisePlan remembered_plan(const MapShape& computed, const MapShape& staged, int multiprocessors) {
  constexpr size_t kMostPlans = 1024;
  static std::mutex mutex;
  static std::map<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>, DepthwisePlan> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() >= kMostPlans) plans.clear();
  const auto [found, is_new] = plans.try_emplace({computed.samples, computed.channels, computed.height, computed.width,
                                                  staged.height, staged.width, multiprocessors});
  if (is_new)
    found->second = plan_depthwise<Tiling>(computed.samples, computed.channels, computed.height, computed.width,
                                           staged.height, staged.width, multiprocessors);
  return found->second;
}

// `computed` from `staged`, which are the maps of `shape`.
template <class Tiling>
DepthwisePlan depthwise_plan(const LaunchContext& context, const DepthwiseShape& shape, const MapShape& computed,
                             const MapShape& staged, std::initializer_list<const void*> maps) {
  const unsigned row_shift = unsigned(shape.row_shift), column_shift = unsigned(shape.column_shift);
  MapShape tiled = computed;
  tiled.height += Tiling::Window::missing(row_shift);
  tiled.width += Tiling::Window::missing(column_shift);
  DepthwisePlan plan = remembered_plan<Tiling>(tiled, staged, multiprocessors(context.device()));
  STD_TORCH_CHECK(plan.slabs > 0, "depthwise: too many samples: ", computed.samples);
  plan.grid.rows = unsigned(computed.height);
  plan.grid.columns = unsigned(computed.width);
  plan.grid.row_shift = row_shift;
  plan.grid.column_shift = column_shift;
  plan.grid.vectors = computed.channels % Tiling::kVector == 0;
  for (const void* map : maps) plan.grid.vectors = plan.grid.vectors && aligned_to_vectors(map);
  return plan;
}

}  // namespace biasloss
