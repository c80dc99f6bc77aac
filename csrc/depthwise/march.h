// What the marches down the rows of a map share: shapes, rings of rows in cache, merging of partial results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../batch_norm/finish.h"
#include "../cpu/activation.h"
#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "partition.h"
#include "rows_simd.h"
#include "window_shift.h"

namespace biasloss {

struct Convolution {
  int64_t kernel, stride;
  int64_t row_shift, column_shift;  // see window_shift.h
  int64_t padding() const { return kernel / 2; }
  int64_t taps() const { return kernel * kernel; }
  int64_t output_size(int64_t size) const { return (size + stride - 1) / stride; }
  MapShape output(const MapShape& in) const {
    return {in.samples, in.channels, output_size(in.height), output_size(in.width)};
  }
  // Rows of the input that output row `row` reads, and rows of the output that input row `row` is read by.
  Range inputs(int64_t row, int64_t height) const {
    const int64_t first = first_input(row);
    return {std::max<int64_t>(0, first), std::min(height, first + kernel)};
  }
  Range outputs(int64_t row, int64_t output_height) const {
    const int64_t last = row + padding() - row_shift;  // times the stride
    return {std::max<int64_t>(0, (last - kernel + stride) / stride), std::min(output_height, last / stride + 1)};
  }
  // Where the window of an output row begins, maybe outside of the map.
  int64_t first_input(int64_t row) const { return row * stride - padding() + row_shift; }
};

// Of a map of the shape `in`.
inline Convolution convolution(const Tensor& weight, const MapShape& in, int64_t stride, bool same_padding) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) == in.channels && weight.size(1) == 1 && weight.size(2) == weight.size(3),
      "weight: expected (", in.channels, ", 1, k, k)");
  const int64_t kernel = weight.size(2);
  STD_TORCH_CHECK(kernel == 3 || kernel == 5 || kernel == 7, "weight: expected a kernel of 3, 5 or 7, got ", kernel);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  return {kernel, stride, window_shift(in.height, stride, same_padding), window_shift(in.width, stride, same_padding)};
}

template <class Function>
const Function& of(const Function (&table)[3][2], const Convolution& c) {
  return table[(c.kernel - 3) / 2][c.stride - 1];
}

// From the op's (2, C); may be null.
template <class Scalar>
Affine<Scalar> affine_of(const Scalar* values, int64_t channels, Activation activation) {
  return {values, values == nullptr ? nullptr : values + channels, static_cast<int>(activation)};
}

// The last `slots` rows of a map, as strips.
template <class Scalar>
class Ring {
 public:
  Ring() = default;
  Ring(Scratch& scratch, int64_t slots, int64_t width, const Convolution& c, int64_t vectors, int64_t lanes)
      : slots_(slots),
        columns_(strip_columns(width, c.kernel)),
        padding_(c.padding() * lanes),
        lanes_(lanes),
        row_(vectors * columns_ * lanes) {
    data_ = scratch.take<Scalar>(slots * row_);
  }
  void clear() { std::fill_n(data_, slots_ * row_, Scalar(0)); }
  Strip<Scalar> operator[](int64_t row) const { return from(row, 0); }
  // Of which `column` is the first column. There are kernel / 2 columns of zeros before column 0.
  Strip<Scalar> from(int64_t row, int64_t column) const {
    return {data_ + row % slots_ * row_ + padding_ + column * lanes_, columns_};
  }

 private:
  Scalar* data_ = nullptr;
  int64_t slots_ = 0, columns_ = 0, padding_ = 0, lanes_ = 0, row_ = 0;
};

// Rows of h that output row `row` reads, from the column on that lies in the middle of the first window. In the ring,
// `before` rows of other samples precede them.
template <class Scalar>
Taps<Scalar> input_taps(const Ring<Scalar>& ring, const Convolution& c, int64_t row, Range inputs, int64_t before = 0) {
  Taps<Scalar> taps = {};
  for (int64_t r = inputs.begin; r < inputs.end; ++r)
    taps.add(ring.from(before + r, c.column_shift), r - c.first_input(row));
  return taps;
}

// Rows of dy that input row `row` gets its gradient from; at stride 1 the kernel is turned round. Where the windows are
// shifted, so is what `input_gradient` computes: from one pair of columns further left on.
template <class Scalar>
Taps<Scalar> output_taps(const Ring<Scalar>& ring, const Convolution& c, int64_t row, Range outputs) {
  Taps<Scalar> taps = {};
  for (int64_t o = outputs.begin; o < outputs.end; ++o) {
    const int64_t index = row - c.first_input(o);
    taps.add(ring.from(o, -c.column_shift), c.stride == 1 ? c.kernel - 1 - index : index);
  }
  return taps;
}

// Packs per-channel rows block by block, as Partition lays them out.
template <class Kernels, class Scalar>
std::vector<Scalar> packed(const Kernels& kernels, const ChannelBlocks& blocks, const Scalar* from,
                           int64_t channel_stride, int64_t row_stride, int64_t rows) {
  std::vector<Scalar> to(static_cast<size_t>(blocks.vectors() * rows * kernels.lanes));
  for (int64_t block = 0; block < blocks.blocks(); ++block) {
    const Range channels = blocks.channels_of(block);
    kernels.pack(from + channels.begin * channel_stride, channel_stride, row_stride, channels.size(), rows,
                 to.data() + blocks.first_vector(block) * rows * kernels.lanes);
  }
  return to;
}

template <class Kernels, class Scalar>
void unpack(const Kernels& kernels, const ChannelBlocks& blocks, const Scalar* from, int64_t rows, Scalar* to,
            int64_t channel_stride, int64_t row_stride) {
  for (int64_t block = 0; block < blocks.blocks(); ++block) {
    const Range channels = blocks.channels_of(block);
    kernels.unpack(from + blocks.first_vector(block) * rows * kernels.lanes, channels.size(), rows,
                   to + channels.begin * channel_stride, channel_stride, row_stride);
  }
}

// Calls share_of(pieces) for the pieces of every thread, of as many threads as `multiply_adds` are worth.
template <class Share>
void for_each_share(const Partition& partition, int64_t multiply_adds, const Share& share_of) {
  constexpr int64_t kMultiplyAddsPerElement = 4;
  if (multiply_adds == 0) return;
  parallel_shares(multiply_adds / kMultiplyAddsPerElement,
                  [&](int64_t share, int64_t shares) { share_of(part_of(partition.pieces(), shares, share)); });
}

// Calls piece(partial, block) for every piece.
template <class Piece>
void for_each_piece(const Partition& partition, int64_t multiply_adds, const Piece& piece) {
  for_each_share(partition, multiply_adds, [&](Range pieces) {
    for (int64_t i = pieces.begin; i < pieces.end; ++i) piece(partition.partial(i), partition.block(i));
  });
}

// Running moments [vectors][shift, mean - shift, m2][lanes] of `counts[i]` values each, merged in order: mean and
// biased variance, [vectors][2][lanes]. See csrc/math/moments.h.
template <class Scalar>
std::vector<Scalar> merge_moments(const std::vector<Scalar>& partial, const std::vector<int64_t>& counts,
                                  int64_t vectors, int64_t lanes) {
  constexpr int64_t kMostLanes = 16;
  std::vector<Scalar> merged(static_cast<size_t>(vectors * 2 * lanes));
  for (int64_t v = 0; v < vectors; ++v) {
    double mean[kMostLanes] = {}, m2[kMostLanes] = {}, count = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] == 0) continue;
      const Scalar* from = partial.data() + (int64_t(i) * vectors + v) * 3 * lanes;
      const double added = double(counts[i]), fraction = added / (count + added);
      for (int64_t k = 0; k < lanes; ++k) {
        const double delta = double(from[k]) + double(from[lanes + k]) - mean[k];
        m2[k] += double(from[2 * lanes + k]) + delta * delta * (count * fraction);
        mean[k] += delta * fraction;
      }
      count += added;
    }
    for (int64_t k = 0; k < lanes; ++k) {
      merged[v * 2 * lanes + k] = static_cast<Scalar>(mean[k]);
      merged[v * 2 * lanes + lanes + k] = static_cast<Scalar>(count == 0 ? 0 : m2[k] / count);
    }
  }
  return merged;
}

// The statistics (4, C) of a map from its running moments in every partial result.
template <class Kernels, class Scalar>
Tensor finished_statistics(const Kernels& kernels, const Partition& partition, const std::vector<Scalar>& partial,
                           const MapShape& shape, const NormArguments& norm) {
  std::vector<int64_t> counts;
  for (int64_t i = 0; i < partition.partials(); ++i)
    counts.push_back(partition.samples_of(i).size() * partition.rows_of(i).size() * shape.width);
  const auto merged = merge_moments(partial, counts, partition.vectors(), kernels.lanes);
  Tensor statistics = empty_tensor({4, shape.channels}, dtype_of<Scalar>);
  unpack(kernels, partition, merged.data(), 2, static_cast<Scalar*>(statistics.mutable_data_ptr()), 1, shape.channels);
  finish_statistics(statistics, shape.rows(), norm);
  return statistics;
}

// `count` rows of `size` values, added in order; the sum replaces the first.
template <class Scalar>
void merge_sums(Scalar* partial, int64_t count, int64_t size) {
  if (count <= 1) return;
  constexpr int64_t kChunk = 256;
  parallel_shares(count * size, [&](int64_t share, int64_t shares) {
    const int64_t chunks = (size + kChunk - 1) / kChunk;
    for (int64_t begin = chunks * share / shares * kChunk; begin < chunks * (share + 1) / shares * kChunk;
         begin += kChunk) {
      const int64_t length = std::min(kChunk, size - begin);
      double sum[kChunk] = {};
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < length; ++k) sum[k] += partial[i * size + begin + k];
      for (int64_t k = 0; k < length; ++k) partial[begin + k] = static_cast<Scalar>(sum[k]);
    }
  });
}

}  // namespace biasloss
