#include "moments_simd.h"

#include "../simd/vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// The first shift is the mean of a few elements, every later one the mean of all elements so far. A chunk is at most 16
// times as long as what its shift was taken from, which bounds the sum of squares that is rounded by a small multiple
// of the sum of squared deviations that is sought, wherever the outliers lie.
constexpr int64_t kFirstShift = 64;
constexpr int64_t kChunkGrowth = 16;
constexpr int64_t kLongestChunk = 8192;

template <class T, class Scalar = typename Compute<T>::Scalar>
Scalar mean_of_first(const T* x, int64_t n) {
  Scalar sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += to_compute(x[i]);
  return sum / Scalar(n);
}

template <class T, class Scalar = typename Compute<T>::Scalar>
Moments<Scalar> moments_of_chunk(const T* x, int64_t n, Scalar shift) {
  using Vector = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  constexpr int unrolled = 4;  // as many additions in flight as their latency needs
  Vector sum[unrolled] = {}, squares[unrolled] = {};
  int64_t i = 0;
  for (; i + unrolled * lanes <= n; i += unrolled * lanes)
    for (int u = 0; u < unrolled; ++u) {
      const Vector d = load(x + i + u * lanes) - shift;
      sum[u] += d;
      squares[u] += d * d;
    }
  Scalar tail_sum = 0, tail_squares = 0;
  for (; i < n; ++i) {
    const Scalar d = to_compute(x[i]) - shift;
    tail_sum += d;
    tail_squares += d * d;
  }
  return moments_from_shifted_sums<Scalar>(
      Scalar(n), shift, horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail_sum,
      horizontal_sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + tail_squares);
}

template <class T, class Scalar = typename Compute<T>::Scalar>
Moments<Scalar> moments(const T* x, int64_t n) {
  Moments<Scalar> total = {0, 0, 0};
  int64_t done = 0, known = n < kFirstShift ? n : kFirstShift;
  Scalar shift = mean_of_first(x, known);
  while (done < n) {
    int64_t length = known * kChunkGrowth;
    if (length > kLongestChunk) length = kLongestChunk;
    if (length > n - done) length = n - done;
    total = merge(total, moments_of_chunk(x + done, length, shift));
    shift = total.mean;
    known = done += length;
  }
  return total;
}

}  // namespace

extern const MomentsTable moments_table;
const MomentsTable moments_table = {moments<float>, moments<double>, moments<Float16>, moments<BFloat16>};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
