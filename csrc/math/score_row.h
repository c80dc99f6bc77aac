// What one pass over a row of scores has to keep for its cross-entropy: the largest score, the sum of exponentials,
// and, against a distribution q over the classes, sum q_k and sum q_k (max - x_k). Both sums grow with every class:
// relative to the running maximum nothing ever cancels.
#pragma once

#include <cmath>

#include "log_sum_exp.h"
#include "macros.h"

namespace biasloss {

template <class T>
struct ScoreRow {
  T max;           // -infinity when empty
  T sum;           // of exp(x_k - max)
  T mass;          // sum of q_k
  T weighted_gap;  // sum of q_k (max - x_k)
};

template <class T>
BIASLOSS_HOST_DEVICE ScoreRow<T> empty_score_row() {
  return {-static_cast<T>(INFINITY), T(0), T(0), T(0)};
}

// What scores are taken relative to. While every score is -infinity that is 0, so that exp(-infinity - 0) is 0 rather
// than NaN. A NaN score never becomes the maximum; it makes `sum` NaN.
template <class T>
BIASLOSS_HOST_DEVICE T score_base(T max) {
  return max == -static_cast<T>(INFINITY) ? T(0) : max;
}

template <class T>
BIASLOSS_HOST_DEVICE ScoreRow<T> raise_max(const ScoreRow<T>& row, T max) {
  const T base = score_base(max);
  const T gap = row.max == -static_cast<T>(INFINITY) ? T(0) : base - row.max;
  return {max, row.sum * exponential(row.max - base), row.mass, row.weighted_gap + gap * row.mass};
}

template <class T>
BIASLOSS_HOST_DEVICE ScoreRow<T> merge(const ScoreRow<T>& a, const ScoreRow<T>& b) {
  const T max = a.max > b.max ? a.max : b.max;
  const ScoreRow<T> x = raise_max(a, max);
  const ScoreRow<T> y = raise_max(b, max);
  return {max, x.sum + y.sum, x.mass + y.mass, x.weighted_gap + y.weighted_gap};
}

// One class of a row whose maximum is already raised to this score.
template <class T>
BIASLOSS_HOST_DEVICE void add_score(ScoreRow<T>& row, T score) {
  row.sum += exponential(score - score_base(row.max));
}

template <class T>
BIASLOSS_HOST_DEVICE void add_score(ScoreRow<T>& row, T score, T q) {
  add_score(row, score);
  row.mass += q;
  row.weighted_gap += q * (score_base(row.max) - score);
}

// -sum_k q_k log p_k
template <class T>
BIASLOSS_HOST_DEVICE T cross_entropy(const ScoreRow<T>& row, T log_sum) {
  return row.weighted_gap + log_sum * row.mass;
}

}  // namespace biasloss
