// Rows of the expanded map, which live in cache only: y1 = x W^T as a product of a few rows of x at a time, and
// h = act(affine(y1)) in a ring.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../depthwise/march.h"
#include "../pointwise/weight.h"
#include "product_simd.h"

namespace biasloss {

template <class T, class Scalar>
struct Expansion {
  const ExpansionKernels<T, Scalar>& product;
  const DepthwiseKernels<Scalar, Scalar>& rows;
  Convolution conv;
  MapShape in;       // of x
  int64_t channels;  // of the expanded map
  const T* x;
  Affine<Scalar> affine;

  // A product of fewer rows of A than this does not pay for loading B. Of small maps, these are rows of several
  // samples: here and below, a row is counted from the first of the first sample on.
  static constexpr int64_t kProductRows = 56;
  int64_t rows_at_once() const {
    const int64_t width = std::max<int64_t>(1, in.width), rows = std::max<int64_t>(1, in.samples * in.height);
    return std::clamp<int64_t>(divide_up(kProductRows, width), 1, rows);
  }
  // Of y1, which input_gradient reads again.
  int64_t product_rows() const {
    return divide_up(conv.padding() + conv.stride + rows_at_once(), rows_at_once()) * rows_at_once();
  }
  int64_t bytes_a_channel() const {
    return (conv.kernel * strip_columns(in.width, conv.kernel) + product_rows() * in.width + in.channels) *
           int64_t(sizeof(Scalar));
  }
  const T* x_at(int64_t row) const { return x + row * in.width * in.channels; }
};

// Those of `samples` whose rows are passed through in one go: all where the band of rows is the whole of each map, else
// the first.
inline Range run_of(Range samples, Range band, int64_t height) {
  return {samples.begin, band.size() == height ? samples.end : samples.begin + 1};
}

// W^T, (input channels, expanded channels).
template <class T, class Scalar>
PackedWeight<Scalar> packed_expansion(const Expansion<T, Scalar>& e, const Tensor& weight) {
  if (is_by_vectors(weight))
    return {weight, e.in.channels, e.channels, dtype_of<T>, e.rows.lanes * int64_t(sizeof(Scalar))};
  return {weight, false, e.rows.lanes * int64_t(sizeof(Scalar)), e.product.pack};
}

template <class T, class Scalar>
class ExpandedRows {
 public:
  ExpandedRows(const Expansion<T, Scalar>& e, Scratch& scratch, int64_t most_channels,
               const PackedWeight<Scalar>& weight)
      : e_(&e),
        weight_(&weight),
        stride_(buffer_stride<Scalar>(most_channels)),
        product_rows_(e.product_rows()),
        wide_stride_(buffer_stride<Scalar>(e.in.channels)) {
    h = Ring<Scalar>(scratch, e.conv.kernel, e.in.width, e.conv, vectors_of(most_channels, e.rows.lanes), e.rows.lanes);
    product_ = scratch.template take<Scalar>(product_rows_ * e.in.width * stride_);
    if constexpr (!std::is_same_v<T, Scalar>)
      wide_ = scratch.template take<Scalar>(e.rows_at_once() * e.in.width * wide_stride_);
  }

  // Rows `rows` will be asked for, in order, for the expanded channels `channels`.
  void begin(Range rows, Range channels) { rows_ = rows, channels_ = channels, next_product_ = next_ = rows.begin; }
  // Makes the rows before `end`: a convolution may read the last ones of h.
  void advance(int64_t end, Upcoming upcoming = {}) {
    for (; next_ < end; ++next_) {
      if (next_ == next_product_) multiply(std::min(e_->rows_at_once(), rows_.end - next_), upcoming);
      const MapRow<const Scalar> from = y1(next_);
      e_->rows.activate(from, {e_->in.width, channels_.size()}, e_->affine.at(channels_.begin), h[next_]);
    }
  }
  // y1, as long as product_rows() lasts.
  MapRow<const Scalar> y1(int64_t row) const { return {product_row(row), stride_}; }

  Ring<Scalar> h;

 private:
  Scalar* product_row(int64_t row) const {
    return product_ + (row - rows_.begin) % product_rows_ * e_->in.width * stride_;
  }
  void multiply(int64_t count, Upcoming& upcoming) {
    const int64_t width = e_->in.width, depth = e_->in.channels;
    const T* x = e_->x_at(next_);
    const Rows<const Scalar> weight = {weight_->from(channels_.begin, e_->rows.lanes), weight_->stride};
    Scalar* to = product_row(next_);
    if constexpr (std::is_same_v<T, Scalar>) {
      if (weight_->by_vectors)
        e_->product.multiply_vectors({count * width, channels_.size(), depth}, {x, depth}, weight, {to, stride_});
      else
        e_->product.multiply({count * width, channels_.size(), depth}, {x, depth, 1}, weight, {to, stride_}, false,
                             upcoming);
    } else {
      e_->product.widen(x, count * width, depth, nullptr, wide_, wide_stride_);
      e_->product.multiply({count * width, channels_.size(), depth}, {wide_, wide_stride_, 1}, weight, {to, stride_},
                           false, upcoming);
    }
    next_product_ += count;
  }

  const Expansion<T, Scalar>* e_;
  const PackedWeight<Scalar>* weight_;
  int64_t stride_, product_rows_, wide_stride_;
  Scalar *product_ = nullptr, *wide_ = nullptr;
  int64_t next_product_ = 0, next_ = 0;  // rows
  Range rows_ = {}, channels_ = {};
};

template <class T, class Scalar>
Expansion<T, Scalar> expansion_of(const Tensor& x, const Tensor& expand_weight, const Tensor& affine,
                                  Activation activation, const Tensor& weight, int64_t stride, bool same_padding) {
  const MapShape in = map_shape(x, "x");
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected (E, 1, k, k), got ", weight.dim(), " dimensions");
  const int64_t channels = weight.size(0);
  STD_TORCH_CHECK(channels >= 1 && in.channels >= 1, "expand_depthwise: expected at least one channel, got ",
                  in.channels, " of x and ", channels, " expanded");
  STD_TORCH_CHECK(is_by_vectors(expand_weight) || (expand_weight.dim() == 4 && expand_weight.size(0) == channels &&
                                                   expand_weight.size(1) == in.channels && expand_weight.size(2) == 1 &&
                                                   expand_weight.size(3) == 1),
                  "expand_weight: expected (", channels, ", ", in.channels, ", 1, 1)");
  STD_TORCH_CHECK(expand_weight.scalar_type() == accumulation_dtype(x.scalar_type()),
                  "expand_weight: expected the accumulation dtype of x");
  return {expansion_tables().of(T()),
          depthwise_tables().of(Scalar()),
          convolution(weight, {in.samples, channels, in.height, in.width}, stride, same_padding),
          in,
          channels,
          static_cast<const T*>(x.const_data_ptr()),
          affine_of(values_of<Scalar>(affine, 2 * channels, "affine"), channels, activation)};
}

}  // namespace biasloss
