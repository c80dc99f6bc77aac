// The layers of a program on maps of bytes. Maps are channels_last (N, C, H, W), or matrices (N, C). A map's levels are
// a float32 tensor (step, zero).
#pragma once

#include "../math/activations.h"
#include "../op_types.h"

namespace biasloss {

// Operands of a convolution: what packs them is biasloss_ext/ops/program/packing.py.
struct QuantizedConvolution {
  Tensor weight, bias, scale, x_levels;
  Tensor y_levels;  // empty: the result is float32
  OptionalTensor residual, residual_levels;
  int64_t outputs, kernel, stride, padding;
  bool same_padding;
  Activation activation;
};

Tensor quantize(const Tensor& x, const Tensor& levels);  // x of any strides
Tensor dequantize(const Tensor& x, const Tensor& levels);
// 1x1, dense or linear.
Tensor quantized_convolution(const Tensor& x, const QuantizedConvolution& of);
Tensor quantized_depthwise(const Tensor& x, const QuantizedConvolution& of);
// Means over positions, in float32.
Tensor quantized_pool(const Tensor& x, const Tensor& levels);
// Averages as F.adaptive_avg_pool2d, to the size of `like`, on the levels of x.
Tensor quantized_average(const Tensor& x, const Tensor& like);
// x times gate (N, C) in float32.
Tensor quantized_gate(const Tensor& x, const Tensor& gate, const Tensor& x_levels, const Tensor& y_levels);

}  // namespace biasloss
