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
constexpr int kUnrolled = 4;  // as many additions in flight as their latency needs
// Nor does any lane add more than this many squares in a row, in whichever instruction set: 128 additions and the ten
// roundings around them err by at most 138 half-ulps, 8.3e-6 in float32, even where every rounding goes the same way,
// as it does for activations of few distinct values.
constexpr int64_t kLongestChain = 128;
// How far ahead memory is asked for: half a page, which the hardware's own prefetching does not reach on every CPU.
constexpr int64_t kPrefetchBytes = 2048;

// Summed in the precision of the data; from there on in double, which costs nothing a chunk and keeps a mean that is
// large beside the spread from being rounded.
template <class T, class Scalar = typename Compute<T>::Scalar>
Moments<double> moments_of_chunk(const T* x, int64_t n, Scalar shift) {
  using Vector = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  Vector sum[kUnrolled] = {}, squares[kUnrolled] = {};
  int64_t i = 0;
  for (; i + kUnrolled * lanes <= n; i += kUnrolled * lanes)
    for (int u = 0; u < kUnrolled; ++u) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + u * lanes) + kPrefetchBytes);
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
  return moments_from_shifted_sums<double>(
      n, shift, horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail_sum,
      horizontal_sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + tail_squares);
}

template <class T, class Scalar = typename Compute<T>::Scalar>
Moments<double> moments(const T* x, int64_t n) {
  constexpr int64_t longest_chunk = kLongestChain * kUnrolled * Compute<T>::lanes;
  Moments<double> total = {0, 0, 0};
  int64_t done = 0, known = n < kFirstShift ? n : kFirstShift;
  Scalar shift = moments_of_chunk(x, known, to_compute(x[0])).mean;
  while (done < n) {
    int64_t length = known * kChunkGrowth;
    if (length > longest_chunk) length = longest_chunk;
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
