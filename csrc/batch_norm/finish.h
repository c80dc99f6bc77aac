// The last step of a batch normalization's statistics, and of its gradient: values per channel, a few kilobytes, on the
// calling thread. Every op that finishes a normalization does it here.
#pragma once

#include "../op_types.h"

namespace biasloss {

// The trailing arguments of the ops that finish the statistics of a normalization.
struct NormArguments {
  const OptionalTensor &weight, &bias;               // (C,); none: ones, zeros
  const OptionalTensor &running_mean, &running_var;  // (C,), moved in place; none: not tracked
  const OptionalTensor& num_batches_tracked;         // int64, counted up in place; none: not counted
  double momentum, eps;
};

// statistics (4, C) come with the mean and the biased variance of `count` values a channel, and get scale and shift.
void finish_statistics(const Tensor& statistics, int64_t count, const NormArguments& norm);

// The same for an op's output: nothing to do where statistics have no elements.
inline void finish_statistics_if_wanted(const Tensor& statistics, int64_t count, const NormArguments& norm) {
  if (statistics.numel() > 0) finish_statistics(statistics, count, norm);
}

// What the gradient of a normalization needs besides its two sums.
struct NormGradientArguments {
  const Tensor &affine, &moments;  // (2, C)
  double eps;
  bool frozen;  // the moments are running statistics, through which no gradient flows
};

// coefficients (6, C) come with sum(du) and sum(du * (y - mean)) in rows 4 and 5, over `count` values a channel. Rows 0
// to 3 become a, b, c and center, rows 4 and 5 the gradients of the norm's weight and bias.
void finish_coefficients(const Tensor& coefficients, int64_t count, const NormGradientArguments& norm);

}  // namespace biasloss
