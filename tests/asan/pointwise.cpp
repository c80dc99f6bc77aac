// 1x1 convolutions over small maps whose memory ends where it must, in pieces and tiles.
#include <initializer_list>
#include <vector>

#include "../../csrc/pointwise/pointwise_simd.h"
#include "../../csrc/simd/padding.h"
#include "cases.h"

namespace biasloss {
namespace {

struct Sizes {
  int64_t samples, positions, channels, outputs;
  int64_t rows() const { return samples * positions; }
  RowTiles tiles() const { return row_tiles(rows(), 8, channels + outputs, 20 * (channels + outputs)); }
};

template <class T, class Scalar>
void run_forward(const Sizes& s, bool everything) {
  const PointwiseForwardTable& table = baseline::pointwise_forward;
  std::vector<T> x(s.rows() * s.channels), y(s.rows() * s.outputs), residual = y;
  std::vector<Scalar> weight(s.channels * s.outputs), scale(s.channels), gate(s.samples * s.channels), bias(s.outputs);
  const int64_t stride = padded_columns<Scalar>(s.outputs);
  std::vector<Scalar> packed(s.channels * stride);
  table.pack.of(Scalar())(s.channels, s.outputs, weight.data(), 1, s.channels, packed.data(), stride);
  const auto if_wanted = [&](auto& values) { return everything ? values.data() : nullptr; };
  const PointwiseForward<Scalar> p = {
      .tiles = s.tiles(),
      .channels = s.channels,
      .outputs = s.outputs,
      .positions = s.positions,
      .x = x.data(),
      .weight = packed.data(),
      .weight_stride = stride,
      .scale = if_wanted(scale),
      .shift = if_wanted(scale),
      .gate = if_wanted(gate),
      .bias = if_wanted(bias),
      .residual = if_wanted(residual),
      .activation = everything ? Activation::hardswish : Activation::identity,
      .output_activation = everything ? Activation::relu : Activation::identity,
      .y = y.data(),
      .want_moments = everything,
  };
  std::vector<char> scratch(table.scratch_bytes(p.tiles, s.channels, s.outputs, sizeof(Scalar)));
  std::vector<double> mean(s.outputs), m2(s.outputs);
  const int64_t half = s.outputs > 32 ? 16 : s.outputs;  // columns are cut at whole lines
  for (int64_t piece = 0; piece < p.tiles.pieces; ++piece)
    for (int64_t first = 0; first < s.outputs; first += half)
      table.piece.of(T())(p, piece, first, first + half < s.outputs ? half : s.outputs - first, scratch.data(),
                          mean.data() + first, m2.data() + first);
}

template <class T, class Scalar>
void run_backward(const Sizes& s, bool everything, bool gated, bool transposed) {
  const PointwiseBackwardTable& table = baseline::pointwise_backward;
  std::vector<T> x(s.rows() * s.channels), grad_x = x, residual_grad = x, grad(s.rows() * s.outputs), y = grad;
  std::vector<Scalar> weight(s.outputs * s.channels), coefficients(4 * s.outputs), row(s.channels),
      gate(s.samples * s.channels);
  const int64_t stride = padded_columns<Scalar>(s.channels);
  std::vector<Scalar> packed(s.outputs * stride);
  table.pack.of(Scalar())(s.outputs, s.channels, weight.data(), s.channels, 1, packed.data(), stride);
  const RowTiles tiles = s.tiles();
  const int64_t weight_rows = transposed ? s.channels : s.outputs;
  const int64_t weight_grad_stride = buffer_stride<Scalar>(transposed ? s.outputs : s.channels);
  std::vector<Scalar> weight_grad(tiles.pieces * weight_rows * weight_grad_stride);
  std::vector<Scalar> slots((tiles.tiles() + (gated ? s.samples : 0)) * kTerms * stride);
  const auto if_wanted = [&](auto& values) { return everything ? values.data() : nullptr; };
  const PointwiseBackward<Scalar> p = {
      .tiles = tiles,
      .channels = s.channels,
      .outputs = s.outputs,
      .positions = s.positions,
      .grad = grad.data(),
      .y = if_wanted(y),
      .coefficients = if_wanted(coefficients),
      .x = x.data(),
      .weight = packed.data(),
      .weight_stride = stride,
      .scale = if_wanted(row),
      .shift = if_wanted(row),
      .center = if_wanted(row),
      .gate = gated ? gate.data() : nullptr,
      .residual_grad = if_wanted(residual_grad),
      .activation = everything ? Activation::silu : Activation::identity,
      .grad_x = grad_x.data(),
      .want_weight = true,
      .transposed = transposed,
      .weight_grad = weight_grad.data(),
      .weight_grad_stride = weight_grad_stride,
      .slots = slots.data(),
      .slot_stride = stride,
  };
  std::vector<char> scratch(table.scratch_bytes(tiles, s.channels, s.outputs, sizeof(Scalar)));
  for (int64_t piece = 0; piece < tiles.pieces; ++piece) table.piece.of(T())(p, piece, scratch.data());
}

template <class T, class Scalar>
void run_both(const Sizes& s) {
  for (const bool everything : {false, true}) {
    run_forward<T, Scalar>(s, everything);
    for (const bool gated : {false, true})
      for (const bool transposed : {false, true}) run_backward<T, Scalar>(s, everything, gated, transposed);
  }
}

}  // namespace

void run_pointwise() {
  for (const Sizes& s : {Sizes{1, 1, 1, 1}, Sizes{2, 5, 3, 17}, Sizes{3, 49, 24, 16}, Sizes{1, 130, 17, 40}}) {
    run_both<float, float>(s);
    run_both<double, double>(s);
    run_both<Float16, float>(s);
    run_both<BFloat16, float>(s);
  }
}

}  // namespace biasloss
