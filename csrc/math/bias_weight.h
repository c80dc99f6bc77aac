// The extrema of a batch's variances, by which they are normalized, and the weights that follow.
#pragma once

#include <cmath>

#include "exponential.h"
#include "macros.h"
#include "weight_formula.h"

namespace biasloss {

// Smallest and largest variance of a batch, over all ranks. Kept as (-min, max), so that one maximum reduces both. A
// batch with a variance that is NaN or infinite is (+infinity, +infinity), which every maximum carries along, while NaN
// would be lost in some implementations of a collective; an empty batch is (-infinity, -infinity).
template <class T>
struct Extrema {
  T negated_min;
  T max;
};

template <class T>
BIASLOSS_HOST_DEVICE Extrema<T> empty_extrema() {
  return {-static_cast<T>(INFINITY), -static_cast<T>(INFINITY)};
}

template <class T>
BIASLOSS_HOST_DEVICE bool is_finite(T x) {
  return x - x == T(0);
}

template <class T>
BIASLOSS_HOST_DEVICE Extrema<T> merge(const Extrema<T>& a, const Extrema<T>& b) {
  return {a.negated_min > b.negated_min ? a.negated_min : b.negated_min, a.max > b.max ? a.max : b.max};
}

template <class T>
BIASLOSS_HOST_DEVICE Extrema<T> extrema_of(T variance) {
  const T infinity = static_cast<T>(INFINITY);
  if (!is_finite(variance)) return {infinity, infinity};
  return {-variance, variance};
}

// False for a batch with a non-finite variance: its weights are NaN and the running minimum does not move.
template <class T>
BIASLOSS_HOST_DEVICE bool is_finite_batch(const Extrema<T>& e) {
  return is_finite(e.negated_min) && is_finite(e.max);
}

struct ExponentialOfNumber {
  template <class T>
  BIASLOSS_HOST_DEVICE T operator()(T x) const {
    return exponential(x);
  }
};

template <class T>
BIASLOSS_HOST_DEVICE T bias_weight(T variance, T low, const Extrema<T>& extrema, T alpha, T beta) {
  const T range = extrema.max + extrema.negated_min;
  return weight_formula(range == T(0) ? T(0) : (variance - low) / range, alpha, beta, ExponentialOfNumber());
}

}  // namespace biasloss
