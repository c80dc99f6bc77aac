#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "../simd/padding.h"
#include "gram_simd.h"
#include "ops.h"

namespace biasloss {
namespace {

constexpr int64_t kRowsOfPiece = 512, kMostPieces = 32;
constexpr int64_t kProductsPerElement = 16;

// Pieces of rows that threads take in any order. They follow from the shape alone, and are merged in order: the result
// does not depend on the number of threads.
template <class Scalar>
struct Pieces {
  Pieces(int64_t rows, int64_t channels) : rows(rows), channels(channels), stride(buffer_stride<Scalar>(channels)) {
    while (count < kMostPieces && 2 * count * kRowsOfPiece <= rows) count *= 2;
    values = empty_tensor({count, (channels + 2) * stride},
                          sizeof(Scalar) == sizeof(double) ? ScalarType::Double : ScalarType::Float);
  }
  int64_t begin(int64_t piece) const { return rows * piece / count; }
  Scalar* pivot(int64_t piece) const {
    return static_cast<Scalar*>(values.mutable_data_ptr()) + piece * (channels + 2) * stride;
  }
  Scalar* sum(int64_t piece) const { return pivot(piece) + stride; }
  Scalar* gram(int64_t piece) const { return sum(piece) + stride; }
  double mean(int64_t piece, int64_t c) const {
    return double(pivot(piece)[c]) + double(sum(piece)[c]) / double(begin(piece + 1) - begin(piece));
  }

  int64_t rows, channels, stride, count = 1;
  Tensor values;
};

// The mean over all rows, from the pieces.
template <class Scalar>
std::vector<double> merged_mean(const Pieces<Scalar>& pieces) {
  std::vector<double> mean(pieces.channels, 0.0);
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    const double share = double(pieces.begin(piece + 1) - pieces.begin(piece)) / double(pieces.rows);
    for (int64_t c = 0; c < pieces.channels; ++c) mean[c] += share * pieces.mean(piece, c);
  }
  return mean;
}

// Rows [begin, end) of sum (x - mean)(x - mean)^T on and above the diagonal. With d the way from a piece's pivot to the
// mean, and s the sum about the pivot, a piece contributes gram - s d^T - d s^T + count d d^T.
template <class Scalar>
void merge_rows(const Pieces<Scalar>& pieces, const std::vector<double>& mean, int64_t begin, int64_t end,
                Scalar* out) {
  const int64_t channels = pieces.channels;
  std::vector<double> total(channels);
  for (int64_t i = begin; i < end; ++i) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const double count = double(pieces.begin(piece + 1) - pieces.begin(piece));
      const Scalar *pivot = pieces.pivot(piece), *sum = pieces.sum(piece), *gram = pieces.gram(piece);
      const double d_i = mean[i] - double(pivot[i]), s_i = double(sum[i]);
      for (int64_t j = i; j < channels; ++j) {
        const double d_j = mean[j] - double(pivot[j]);
        total[j] += double(gram[i * pieces.stride + j]) - s_i * d_j - d_i * (double(sum[j]) - count * d_j);
      }
    }
    for (int64_t j = i; j < channels; ++j) out[i * channels + j] = out[j * channels + i] = Scalar(total[j]);
  }
}

template <class Element, class Scalar>
void gram_of(const Element* x, int64_t rows, int64_t channels, Scalar* mean_out, Scalar* gram_out) {
  const GramTable& table = gram_table();
  const Pieces<Scalar> pieces(rows, channels);
  const int64_t bytes = table.scratch_bytes(channels, sizeof(Scalar));
  parallel_shares(rows * channels + rows * channels * channels / kProductsPerElement, [&](int64_t share,
                                                                                          int64_t shares) {
    void* scratch = Scratch::lay_out([bytes](Scratch& s) { return s.take<char>(bytes); });
    for (int64_t piece = pieces.count * share / shares; piece < pieces.count * (share + 1) / shares; ++piece)
      table.of(Element())(x + pieces.begin(piece) * channels, pieces.begin(piece + 1) - pieces.begin(piece), channels,
                          scratch, pieces.pivot(piece), pieces.sum(piece), pieces.gram(piece), pieces.stride);
  });
  const std::vector<double> mean = merged_mean(pieces);
  for (int64_t c = 0; c < channels; ++c) mean_out[c] = Scalar(mean[c]);
  parallel_shares(pieces.count * channels * channels, [&](int64_t share, int64_t shares) {
    merge_rows(pieces, mean, channels * share / shares, channels * (share + 1) / shares, gram_out);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> channel_gram_cpu(Tensor x) {
  const MapShape s = map_shape(x, "x");
  const ScalarType wide = accumulation_dtype(x.scalar_type());
  Tensor mean = empty_tensor({s.channels}, wide), gram = empty_tensor({s.channels, s.channels}, wide);
  with_element(x.scalar_type(), [&](auto element, auto scalar) {
    using Element = decltype(element);
    using Scalar = decltype(scalar);
    auto *of_mean = static_cast<Scalar*>(mean.mutable_data_ptr()),
         *of_gram = static_cast<Scalar*>(gram.mutable_data_ptr());
    if (s.rows() == 0) {
      std::fill(of_mean, of_mean + s.channels, Scalar(0));
      std::fill(of_gram, of_gram + s.channels * s.channels, Scalar(0));
    } else {
      gram_of(static_cast<const Element*>(x.const_data_ptr()), s.rows(), s.channels, of_mean, of_gram);
    }
  });
  return {mean, gram};
}

}  // namespace biasloss
