// Online log-sum-exp: the running maximum and the sum of exp(x - maximum).
#pragma once

#include <cmath>

#include "macros.h"

namespace biasloss {

template <class T>
struct LogSumExp {
  T max;  // -infinity when empty
  T sum;
};

template <class T>
BIASLOSS_HOST_DEVICE LogSumExp<T> empty_log_sum_exp() {
  return {-static_cast<T>(INFINITY), T(0)};
}

BIASLOSS_HOST_DEVICE float exponential(float x) { return ::expf(x); }
BIASLOSS_HOST_DEVICE double exponential(double x) { return ::exp(x); }

// -infinity scores add nothing, also while the maximum is still -infinity, where x - max would be NaN. NaN and
// +infinity make the sum NaN, as torch's log_softmax does.
template <class T>
BIASLOSS_HOST_DEVICE LogSumExp<T> merge(const LogSumExp<T>& a, const LogSumExp<T>& b) {
  if (b.sum == T(0)) return a;
  if (a.sum == T(0)) return b;
  const T max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * exponential(a.max - max) + b.sum * exponential(b.max - max)};
}

template <class T>
BIASLOSS_HOST_DEVICE LogSumExp<T> push(const LogSumExp<T>& a, T x) {
  if (x > a.max) return {x, a.sum * exponential(a.max - x) + exponential(x - x)};
  if (x == -static_cast<T>(INFINITY)) return a;
  return {a.max, a.sum + exponential(x - a.max)};
}

}  // namespace biasloss
