// The layers of a program that are no ops of their own. float32 and float64 alone.
#pragma once

#include "../math/activations.h"
#include "../op_types.h"

namespace biasloss {

// act(conv(x) + bias), a map. x may have any strides; weight is (K, C, k, k), its memory (k, k, C, at least K) by
// column, row and channel, in rows of whole cache lines.
Tensor dense_convolution(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                         Activation activation);

// act(x weight^T + bias) of x (N, C) and weight (K, C).
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation);

// Averages of a map over windows, as F.adaptive_avg_pool2d, to the size of `like`.
Tensor average_to(const Tensor& x, const Tensor& like);

}  // namespace biasloss
