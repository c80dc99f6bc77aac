// Count, mean and sum of squared deviations, and how to merge two of them without cancellation.
#pragma once

#include "macros.h"

namespace biasloss {

template <class T>
struct Moments {
  T count;
  T mean;
  T m2;  // sum of squared deviations from the mean
};

// From the sums of (x - shift) and (x - shift)^2. The shift must lie near the data: the rounding error of m2 is that of
// sum_of_squares, which is close to m2 when |mean - shift| is of the order of the spread.
template <class T>
BIASLOSS_HOST_DEVICE Moments<T> moments_from_shifted_sums(T count, T shift, T sum, T sum_of_squares) {
  if (count == T(0)) return {T(0), T(0), T(0)};
  const T mean_of_shifted = sum / count;
  const T m2 = sum_of_squares - sum * mean_of_shifted;
  // A NaN must survive: no fmax, which would swallow it.
  return {count, shift + mean_of_shifted, m2 < T(0) ? T(0) : m2};
}

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
template <class T>
BIASLOSS_HOST_DEVICE Moments<T> merge(const Moments<T>& a, const Moments<T>& b) {
  if (a.count == T(0)) return b;
  if (b.count == T(0)) return a;
  const T count = a.count + b.count;
  const T delta = b.mean - a.mean;
  const T fraction = b.count / count;
  return {count, a.mean + delta * fraction, a.m2 + b.m2 + delta * delta * (a.count * fraction)};
}

// Unbiased (divisor n - 1); a single value has variance 0.
template <class T>
BIASLOSS_HOST_DEVICE T unbiased_variance(const Moments<T>& m) {
  return m.count > T(1) ? m.m2 / (m.count - T(1)) : T(0) * m.mean;
}

}  // namespace biasloss
