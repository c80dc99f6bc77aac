// The plain depthwise convolution in place, see plain_simd.h.
#pragma once

#include <tuple>

#include "march.h"

namespace biasloss {

// Whether there are kernels for it: elements of the accumulation dtype, whole channel vectors.
bool plain_depthwise_runs(const Tensor& x);

Tensor plain_depthwise(const Tensor& x, const Tensor& weight, int64_t stride, bool same_padding);

struct PlainBackward {
  const Tensor &dy, &x, &weight;
  const OptionalTensor& residual_grad;  // added to grad_x
  int64_t stride;
  bool same_padding, want_x, want_weight;
};

// (grad_x, grad_weight)
std::tuple<Tensor, Tensor> plain_depthwise_backward(const PlainBackward& of);

}  // namespace biasloss
