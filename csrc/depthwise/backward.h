// What the backward passes of depthwise and expand_depthwise share.
#pragma once

#include <optional>
#include <vector>

#include "march.h"

namespace biasloss {

struct OutputGradientTensors {
  const std::optional<Tensor>&grad, &pool_grad, &y, &y_affine, &y_coefficients;
  Activation y_activation;
};

// A map that has to have this shape, and elements like x.
template <class T>
const T* map_values(const Tensor& map, const MapShape& expected, const char* name) {
  const MapShape s = map_shape(map, name);
  STD_TORCH_CHECK(s.samples == expected.samples && s.channels == expected.channels && s.height == expected.height &&
                      s.width == expected.width,
                  name, ": expected (", expected.samples, ", ", expected.channels, ", ", expected.height, ", ",
                  expected.width, ")");
  STD_TORCH_CHECK(map.scalar_type() == dtype_of<T>, name, ": expected the dtype of x");
  return static_cast<const T*>(map.const_data_ptr());
}

// The rows of dy are made from these; see OutputGradient in rows_simd.h.
template <class T, class Scalar>
class DepthwiseGradientAtOutput {
 public:
  DepthwiseGradientAtOutput(const OutputGradientTensors& from, const MapShape& out)
      : grad_(map_of(from.grad, out, "grad")),
        y_(map_of(from.y, out, "y")),
        pool_grad_(values_of<Scalar>(from.pool_grad, out.samples * out.channels, "pool_grad")),
        pool_scale_(Scalar(1) / Scalar(std::max<int64_t>(1, out.positions()))),
        affine_(
            affine_of(values_of<Scalar>(from.y_affine, 2 * out.channels, "y_affine"), out.channels, from.y_activation)),
        coefficients_(values_of<Scalar>(from.y_coefficients, 6 * out.channels, "y_coefficients")) {
    STD_TORCH_CHECK(grad_ != nullptr || y_ != nullptr || out.rows() == 0, "expected grad where there is no y");
    STD_TORCH_CHECK((y_ == nullptr) == (coefficients_ == nullptr) || out.rows() == 0,
                    "expected y and y_coefficients, or neither");
  }

  OutputGradient<T, Scalar> row(const MapShape& out, int64_t sample, int64_t row, int64_t channel) const {
    const int64_t offset = (sample * out.height + row) * out.width * out.channels + channel;
    OutputGradient<T, Scalar> from = {};
    from.grad = {grad_ == nullptr ? nullptr : grad_ + offset, out.channels};
    from.y = {y_ == nullptr ? nullptr : y_ + offset, out.channels};
    from.pool_grad = pool_grad_ == nullptr ? nullptr : pool_grad_ + sample * out.channels + channel;
    from.pool_scale = pool_scale_;
    from.affine = affine_.at(channel);
    for (int i = 0; coefficients_ != nullptr && i < 4; ++i)
      from.coefficients[i] = coefficients_ + i * out.channels + channel;
    return from;
  }

 private:
  static const T* map_of(const std::optional<Tensor>& map, const MapShape& out, const char* name) {
    return map.has_value() ? map_values<T>(*map, out, name) : nullptr;
  }

  const T *grad_, *y_;
  const Scalar* pool_grad_;
  Scalar pool_scale_;
  Affine<Scalar> affine_;
  const Scalar* coefficients_;
};

// At stride 1 the data gradient is a convolution with the kernel turned round.
template <class Kernels, class Scalar>
std::vector<Scalar> packed_for_input_gradient(const Kernels& kernels, const ChannelBlocks& blocks,
                                              const Convolution& conv, const Scalar* weight) {
  auto weights = packed(kernels, blocks, weight, conv.taps(), 1, conv.taps());
  if (conv.stride == 1)
    for (int64_t v = 0; v < blocks.vectors(); ++v)
      for (int64_t i = 0; i < conv.taps() / 2; ++i) {
        Scalar* vector = weights.data() + v * conv.taps() * kernels.lanes;
        std::swap_ranges(vector + i * kernels.lanes, vector + (i + 1) * kernels.lanes,
                         vector + (conv.taps() - 1 - i) * kernels.lanes);
      }
  return weights;
}

}  // namespace biasloss
