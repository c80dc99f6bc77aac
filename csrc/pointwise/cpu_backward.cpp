#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "ops.h"
#include "pointwise_simd.h"
#include "weight.h"

namespace biasloss {
namespace {

// A tile of dy and of z. Long tiles, as a part of the weight's gradient is read and written once a tile.
constexpr int64_t kValuesOfTile = 112 * 1024;
// Rows that pay for one more part of the weight's gradient, which is written and added up once a piece.
constexpr int64_t kRowsOfPiece = 256;
constexpr int64_t kProductsPerElement = 16;

// The sums of every sample, from its parts in tiles, in order.
template <class Scalar>
void add_parts(const PointwiseBackward<Scalar>& p, int64_t sample, int64_t samples, Scalar* gate_grad, Scalar* sums) {
  std::vector<double> total(p.channels);
  const int64_t first = p.tiles.tile_of(sample * p.positions), last = p.tiles.tile_of((sample + 1) * p.positions - 1);
  for (int term = gate_grad == nullptr ? 1 : 0; term < (sums == nullptr ? 1 : kTerms); ++term) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t tile = first; tile <= last; ++tile) {
      const Scalar* part = p.slots + ((tile + sample) * kTerms + term) * p.slot_stride;
      for (int64_t c = 0; c < p.channels; ++c) total[c] += double(part[c]);
    }
    Scalar* to = term == 0 ? gate_grad + sample * p.channels : sums + ((term - 1) * samples + sample) * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) to[c] = Scalar(total[c]);
  }
}

// Rows [begin, end) of the parts of the weight's gradient, added up into the first one in order, and copied from there.
template <class Scalar>
void add_weight_grads(const PointwiseBackward<Scalar>& p, int64_t begin, int64_t end, Scalar* grad_weight) {
  const int64_t rows = p.transposed ? p.channels : p.outputs, columns = p.transposed ? p.outputs : p.channels;
  for (int64_t row = begin; row < end; ++row) {
    Scalar* sum = p.weight_grad + row * p.weight_grad_stride;
    for (int64_t piece = 1; piece < p.tiles.pieces; ++piece) {
      const Scalar* part = sum + piece * rows * p.weight_grad_stride;
      for (int64_t i = 0; i < columns; ++i) sum[i] += part[i];
    }
    const int64_t row_stride = p.transposed ? 1 : p.channels, column_stride = p.transposed ? p.channels : 1;
    for (int64_t i = 0; i < columns; ++i) grad_weight[row * row_stride + i * column_stride] = sum[i];
  }
}

// A row of the result is rounded up to whole vectors: the orientation that wastes less.
bool better_transposed(int64_t outputs, int64_t channels, int64_t lanes) {
  const auto padded = [lanes](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
  return padded(outputs) * channels < padded(channels) * outputs;
}

template <class Scalar>
void zero(Tensor& t) {
  auto* values = static_cast<Scalar*>(t.mutable_data_ptr());
  std::fill(values, values + t.numel(), Scalar(0));
}

template <class Element, class Scalar>
void backward(PointwiseBackward<Scalar>& p, Element element, int64_t samples, ScalarType dtype, Scalar* grad_weight,
              Scalar* gate_grad, Scalar* sums) {
  const PointwiseBackwardTable& table = pointwise_backward_table();
  const int64_t lanes = table.vector_bytes / int64_t(sizeof(Scalar)), none = 0;
  p.transposed = better_transposed(p.outputs, p.channels, lanes);
  const int64_t weight_rows = p.transposed ? p.channels : p.outputs;
  p.weight_grad_stride = buffer_stride<Scalar>(p.transposed ? p.outputs : p.channels);
  Tensor weight_grads =
      empty_tensor({p.want_weight ? p.tiles.pieces * weight_rows * p.weight_grad_stride : none}, dtype);
  p.weight_grad = static_cast<Scalar*>(weight_grads.mutable_data_ptr());
  const bool summed = gate_grad != nullptr || sums != nullptr;
  p.slot_stride = padded_columns<Scalar>(p.channels);
  Tensor slots = empty_tensor({summed ? (p.tiles.tiles() + samples) * kTerms * p.slot_stride : none}, dtype);
  p.slots = static_cast<Scalar*>(slots.mutable_data_ptr());

  const int64_t bytes = table.scratch_bytes(p.tiles, p.channels, p.outputs, sizeof(Scalar));
  const int64_t rows = p.tiles.rows;
  const int64_t work = rows * (p.channels + p.outputs) + 2 * rows * p.channels * p.outputs / kProductsPerElement;
  parallel_shares(work, [&](int64_t share, int64_t shares) {
    void* scratch = Scratch::lay_out([bytes](Scratch& s) { return s.take<char>(bytes); });
    for (int64_t piece = p.tiles.pieces * share / shares; piece < p.tiles.pieces * (share + 1) / shares; ++piece)
      table.piece.of(element)(p, piece, scratch);
  });
  const int64_t reduced = (p.want_weight ? weight_grads.numel() : 0) + (summed ? slots.numel() : 0);
  parallel_shares(reduced, [&](int64_t share, int64_t shares) {
    if (p.want_weight)
      add_weight_grads(p, weight_rows * share / shares, weight_rows * (share + 1) / shares, grad_weight);
    if (summed)
      for (int64_t sample = samples * share / shares; sample < samples * (share + 1) / shares; ++sample)
        add_parts(p, sample, samples, gate_grad, sums);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> pointwise_backward_cpu(
    Tensor grad, std::optional<Tensor> y, std::optional<Tensor> coefficients, Tensor x, Tensor weight,
    std::optional<Tensor> affine, std::optional<Tensor> center, int64_t activation, std::optional<Tensor> gate,
    std::optional<Tensor> residual_grad, bool want_x, bool want_weight) {
  const MapShape s = map_shape(x, "x");
  const ScalarType dtype = x.scalar_type(), wide = accumulation_dtype(dtype);
  check_weight(weight, s.channels, wide);
  STD_TORCH_CHECK(affine.has_value() || (activation == 0 && !center.has_value()),
                  "an activation and center need affine, got none");
  const MapShape out = {s.samples, weight.size(0), s.height, s.width};
  Tensor grad_x = want_x ? empty_map(s, dtype) : empty_tensor({0}, dtype);
  Tensor grad_weight = want_weight ? empty_tensor({out.channels, s.channels, 1, 1}, wide) : empty_tensor({0}, wide);
  Tensor gate_grad = gate.has_value() ? empty_tensor({s.samples, s.channels}, wide) : empty_tensor({0}, wide);
  Tensor sums = center.has_value() ? empty_tensor({4, s.samples, s.channels}, wide) : empty_tensor({0}, wide);
  with_element(dtype, [&](auto element, auto scalar) {
    using Scalar = decltype(scalar);
    if (s.rows() == 0) {
      zero<Scalar>(grad_weight), zero<Scalar>(gate_grad), zero<Scalar>(sums);
      return;
    }
    const PointwiseBackwardTable& table = pointwise_backward_table();
    const PackedWeight<Scalar> packed(weight, true, table.vector_bytes, table.pack.of(scalar));
    const Scalar* scale = values_of<Scalar>(affine, 2 * s.channels, "affine");
    const bool behind_norm = y.has_value() && coefficients.has_value();
    PointwiseBackward<Scalar> p = {
        .tiles = row_tiles(s.rows(), kRowsOfPiece, s.channels + out.channels, kValuesOfTile),
        .channels = s.channels,
        .outputs = out.channels,
        .positions = s.positions(),
        .grad = map_values(grad, out, dtype, "grad"),
        .y = behind_norm ? map_values(y, out, dtype, "y") : nullptr,
        .coefficients = behind_norm ? values_of<Scalar>(coefficients, 4 * out.channels, "coefficients") : nullptr,
        .x = x.const_data_ptr(),
        .weight = packed.data,
        .weight_stride = packed.stride,
        .scale = scale,
        .shift = scale == nullptr ? nullptr : scale + s.channels,
        .center = values_of<Scalar>(center, s.channels, "center"),
        .gate = values_of<Scalar>(gate, s.samples * s.channels, "gate"),
        .residual_grad = map_values(residual_grad, s, dtype, "residual_grad"),
        .activation = Activation(activation),
        .grad_x = want_x ? grad_x.mutable_data_ptr() : nullptr,
        .want_weight = want_weight,
    };
    const auto values = [](Tensor& t) { return t.numel() == 0 ? nullptr : static_cast<Scalar*>(t.mutable_data_ptr()); };
    backward(p, element, s.samples, wide, values(grad_weight), values(gate_grad), values(sums));
  });
  return {grad_x, grad_weight, gate_grad, sums};
}

}  // namespace biasloss
