// What one pass over a row of scores has to keep for its cross-entropy: the largest score, the sum of exponentials,
// and, against a distribution q over the classes, sum q_k and sum q_k (max - x_k). Both sums grow with every class:
// relative to the running maximum nothing ever cancels. The largest scores are counted apart, so that their ones
// swallow none of the small terms: where one score is far above the others, those terms are all of the loss.
#pragma once

#include <cmath>

#include "exponential.h"
#include "macros.h"

namespace biasloss {

template <class T>
struct ScoreRow {
  T max;           // -infinity when empty
  T largest;       // how many x_k equal max
  T rest;          // sum of exp(x_k - max) over the others
  T mass;          // sum of q_k
  T weighted_gap;  // sum of q_k (max - x_k)
};

template <class T>
BIASLOSS_HOST_DEVICE ScoreRow<T> empty_score_row() {
  return {-static_cast<T>(INFINITY), T(0), T(0), T(0), T(0)};
}

// What scores are taken relative to. While every score is -infinity that is 0, so that exp(-infinity - 0) is 0 rather
// than NaN. A NaN score never becomes the maximum; it makes `rest` NaN.
template <class T>
BIASLOSS_HOST_DEVICE T score_base(T max) {
  return max == -static_cast<T>(INFINITY) ? T(0) : max;
}

template <class T>
BIASLOSS_HOST_DEVICE ScoreRow<T> raise_max(const ScoreRow<T>& row, T max) {
  if (max == row.max) return row;
  const T base = score_base(max);
  const T gap = row.max == -static_cast<T>(INFINITY) ? T(0) : base - row.max;
  const T rest = (row.largest + row.rest) * exponential(row.max - base);
  return {max, T(0), rest, row.mass, row.weighted_gap + gap * row.mass};
}

template <class T>
BIASLOSS_HOST_DEVICE ScoreRow<T> merge(const ScoreRow<T>& a, const ScoreRow<T>& b) {
  const T max = a.max > b.max ? a.max : b.max;
  const ScoreRow<T> x = raise_max(a, max);
  const ScoreRow<T> y = raise_max(b, max);
  return {max, x.largest + y.largest, x.rest + y.rest, x.mass + y.mass, x.weighted_gap + y.weighted_gap};
}

// One class of a row whose maximum is already raised to this score.
template <class T>
BIASLOSS_HOST_DEVICE void add_score(ScoreRow<T>& row, T score) {
  const T gap = score - score_base(row.max);
  if (gap == T(0))
    row.largest += T(1);
  else
    row.rest += exponential(gap);
}

template <class T>
BIASLOSS_HOST_DEVICE void add_score(ScoreRow<T>& row, T score, T q) {
  add_score(row, score);
  row.mass += q;
  row.weighted_gap += q * (score_base(row.max) - score);
}

// log of the sum of exp(x_k - max); -infinity where every score is -infinity
template <class T>
BIASLOSS_HOST_DEVICE T log_sum(const ScoreRow<T>& row) {
  return logarithm_of_one_plus((row.largest - T(1)) + row.rest);
}

// -sum_k q_k log p_k
template <class T>
BIASLOSS_HOST_DEVICE T cross_entropy(const ScoreRow<T>& row, T log_sum) {
  return row.weighted_gap + log_sum * row.mass;
}

}  // namespace biasloss
