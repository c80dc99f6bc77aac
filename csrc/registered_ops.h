// Every op that a library registers, by device, and the names of its tensors. The schemas are defined in Python, in
// biasloss_ext/ops/<op>/op.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include "batch_norm/ops.h"
#include "bias_loss/ops.h"
#include "channel_gram/ops.h"
#include "depthwise/ops.h"
#include "expand_depthwise/ops.h"
#include "feature_variance/ops.h"
#include "on_one_device.h"
#include "pointwise/ops.h"
#include "pool_variance/ops.h"
#include "program/ops.h"
#include "squeeze_excite/ops.h"

// Tensors in the order of the schema, optional ones included: what an error calls them.
namespace biasloss::tensors_of {

#define BIASLOSS_NORM "norm_weight norm_bias running_mean running_var num_batches_tracked"

inline constexpr Text batch_norm_affine = "moments " BIASLOSS_NORM;
inline constexpr Text batch_norm_apply = "y affine residual";
inline constexpr Text batch_norm_backward = "grad y affine coefficients";
inline constexpr Text batch_norm_coefficients = "grad y affine moments";
inline constexpr Text batch_norm_statistics = "y " BIASLOSS_NORM;
inline constexpr Text bias_loss = "features variance extrema output target class_weight running_min";
inline constexpr Text bias_loss_backward = "grad_loss output target class_weight weight statistics";
inline constexpr Text channel_gram = "x";
inline constexpr Text channel_gram_product = "x mean gram weight weight_gram";
inline constexpr Text depthwise = "x weight affine " BIASLOSS_NORM;
inline constexpr Text depthwise_backward =
    "x weight grad pool_grad y y_affine y_coefficients affine moments residual_grad";
inline constexpr Text expand_depthwise = "x expand_weight affine weight " BIASLOSS_NORM;
inline constexpr Text expand_depthwise_activate = "x expand_weight affine weight y_affine";
inline constexpr Text expand_depthwise_backward =
    "x x_mean expand_weight affine moments weight y y_affine y_coefficients grad pool_grad";
inline constexpr Text feature_variance = "features";
inline constexpr Text pointwise = "x weight affine gate bias residual " BIASLOSS_NORM;
inline constexpr Text pointwise_backward = "grad x weight y y_coefficients affine moments gate residual_grad";
inline constexpr Text pool_variance = "x affine";
inline constexpr Text pool_variance_backward = "pool_grad x affine moments";
inline constexpr Text program = "x constants";
inline constexpr Text squeeze_excite = "pooled reduce_weight reduce_bias expand_weight expand_bias";
inline constexpr Text squeeze_excite_backward =
    "gate_grad pooled reduced expanded reduce_weight expand_weight sums affine moments";

#undef BIASLOSS_NORM

}  // namespace biasloss::tensors_of

// OP(name), for every op.
#define BIASLOSS_CPU_OPS(OP)    \
  OP(batch_norm_affine)         \
  OP(batch_norm_apply)          \
  OP(batch_norm_backward)       \
  OP(batch_norm_coefficients)   \
  OP(batch_norm_statistics)     \
  OP(bias_loss)                 \
  OP(bias_loss_backward)        \
  OP(channel_gram)              \
  OP(channel_gram_product)      \
  OP(depthwise)                 \
  OP(depthwise_backward)        \
  OP(expand_depthwise)          \
  OP(expand_depthwise_activate) \
  OP(expand_depthwise_backward) \
  OP(feature_variance)          \
  OP(pointwise)                 \
  OP(pointwise_backward)        \
  OP(pool_variance)             \
  OP(pool_variance_backward)    \
  OP(program)                   \
  OP(squeeze_excite)            \
  OP(squeeze_excite_backward)

#define BIASLOSS_CUDA_OPS(OP) \
  OP(bias_loss)               \
  OP(bias_loss_backward)      \
  OP(depthwise)               \
  OP(depthwise_backward)      \
  OP(feature_variance)

// Into the library `m` of a STABLE_TORCH_LIBRARY_IMPL.
#define BIASLOSS_REGISTER(op, function) \
  m.impl(#op, TORCH_BOX((&biasloss::OnOneDevice<#op, biasloss::tensors_of::op, &biasloss::function>::call)));
#define BIASLOSS_REGISTER_CPU(op) BIASLOSS_REGISTER(op, op##_cpu)
#define BIASLOSS_REGISTER_CUDA(op) BIASLOSS_REGISTER(op, op##_cuda)
