#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "../batch_norm/finish.h"
#include "../cpu/activation.h"
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

// What is wanted besides grad_x; null: not wanted.
template <class Scalar>
struct Sums {
  Scalar *grad_weight, *gate_grad;
  Scalar* of_samples;  // (4, samples, channels)
  Scalar* of_norm;     // (2, channels)
};

// The sums of every sample, from its parts in tiles, in order.
template <class Scalar>
void add_parts(const PointwiseBackward<Scalar>& p, int64_t sample, int64_t samples, const Sums<Scalar>& sums) {
  std::vector<double> total(p.channels);
  const int64_t first = p.tiles.tile_of(sample * p.positions), last = p.tiles.tile_of((sample + 1) * p.positions - 1);
  for (int term = 0; term < (sums.of_samples == nullptr ? 1 : kTerms); ++term) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t tile = first; tile <= last; ++tile) {
      const Scalar* part = p.slots + ((tile + sample) * kTerms + term) * p.slot_stride;
      for (int64_t c = 0; c < p.channels; ++c) total[c] += double(part[c]);
    }
    Scalar* to = term == 0 ? sums.gate_grad + sample * p.channels
                           : sums.of_samples + ((term - 1) * samples + sample) * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) to[c] = Scalar(total[c]);
  }
}

// The sums of channels [begin, end) over all tiles, in order.
template <class Scalar>
void add_tiles(const PointwiseBackward<Scalar>& p, int64_t begin, int64_t end, Scalar* of_norm) {
  std::vector<double> total(end - begin);
  for (const int term : {kSumOfGradient, kSumOfProducts}) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t tile = 0; tile < p.tiles.tiles(); ++tile) {
      const Scalar* part = p.slots + (tile * kTerms + term) * p.slot_stride + begin;
      for (int64_t i = 0; i < end - begin; ++i) total[i] += double(part[i]);
    }
    Scalar* to = of_norm + (term == kSumOfGradient ? 0 : p.channels) + begin;
    for (int64_t i = 0; i < end - begin; ++i) to[i] = Scalar(total[i]);
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

template <class T>
T value_of(T x) {
  return x;
}
float value_of(Float16 x) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits); }
float value_of(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// Scale and shift that take off every channel the mean of a few positions, spread over the map. Where the gradient at
// the output sums to zero, that leaves the weight's gradient as it is, but for what rounding leaves of the sum: it is
// multiplied by values near zero instead of the mean.
template <class Scalar, class Element>
std::vector<Scalar> affine_to_origin(const Element* x, int64_t rows, int64_t channels) {
  constexpr int64_t kMostPositions = 64;
  const int64_t count = std::min(rows, kMostPositions);
  std::vector<Scalar> affine(2 * channels);
  std::fill_n(affine.data(), channels, Scalar(1));
  Scalar* shift = affine.data() + channels;
  for (int64_t i = 0; i < count; ++i) {
    const Element* row = x + (2 * i + 1) * rows / (2 * count) * channels;
    for (int64_t c = 0; c < channels; ++c) shift[c] -= value_of(row[c]) / Scalar(count);
  }
  return affine;
}

template <class Element, class Scalar>
void backward(PointwiseBackward<Scalar>& p, Element element, int64_t samples, ScalarType dtype,
              const Sums<Scalar>& sums) {
  const PointwiseBackwardTable& table = pointwise_backward_table();
  const int64_t lanes = table.vector_bytes / int64_t(sizeof(Scalar)), none = 0;
  p.transposed = better_transposed(p.outputs, p.channels, lanes);
  const int64_t weight_rows = p.transposed ? p.channels : p.outputs;
  p.weight_grad_stride = buffer_stride<Scalar>(p.transposed ? p.outputs : p.channels);
  Tensor weight_grads =
      empty_tensor({p.want_weight ? p.tiles.pieces * weight_rows * p.weight_grad_stride : none}, dtype);
  p.weight_grad = static_cast<Scalar*>(weight_grads.mutable_data_ptr());
  const bool gated = sums.gate_grad != nullptr, summed = gated || sums.of_norm != nullptr;
  p.slot_stride = padded_columns<Scalar>(p.channels);
  const int64_t parts = p.tiles.tiles() + (gated ? samples : 0);
  Tensor slots = empty_tensor({summed ? parts * kTerms * p.slot_stride : none}, dtype);
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
    const auto part_of = [&](int64_t count) { return std::pair(count * share / shares, count * (share + 1) / shares); };
    if (p.want_weight) {
      const auto [begin, end] = part_of(weight_rows);
      add_weight_grads(p, begin, end, sums.grad_weight);
    }
    if (gated) {
      const auto [begin, end] = part_of(samples);
      for (int64_t sample = begin; sample < end; ++sample) add_parts(p, sample, samples, sums);
    }
    if (sums.of_norm != nullptr) {
      const auto [begin, end] = part_of(p.channels);
      add_tiles(p, begin, end, sums.of_norm);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_backward_cpu(
    Tensor grad, Tensor x, Tensor weight, OptionalTensor y, OptionalTensor y_coefficients, OptionalTensor affine,
    OptionalTensor moments, int64_t activation, OptionalTensor gate, OptionalTensor residual_grad, bool any_origin,
    bool want_x, bool want_weight, double eps, bool frozen) {
  const MapShape s = map_shape(x, "x");
  const ScalarType dtype = x.scalar_type(), wide = accumulation_dtype(dtype);
  const Activation function = checked_activation(activation, "activation");
  check_weight(weight, s.channels, wide);
  STD_TORCH_CHECK(affine.has_value() || (function == Activation::identity && !moments.has_value()),
                  "an activation and moments need affine, got none");
  const MapShape out = {s.samples, weight.size(0), s.height, s.width};
  const bool gated = gate.has_value(), behind_norm = y.has_value() && y_coefficients.has_value();
  const bool finishes = moments.has_value() && !gated;
  const auto tensor_if = [wide](bool wanted, std::initializer_list<int64_t> sizes) {
    return wanted ? empty_tensor(sizes, wide) : empty_tensor({0}, wide);
  };
  Tensor grad_x = want_x ? empty_map(s, dtype) : empty_tensor({0}, dtype);
  Tensor grad_weight = tensor_if(want_weight, {out.channels, s.channels, 1, 1});
  Tensor gate_grad = tensor_if(gated, {s.samples, s.channels});
  Tensor sums = tensor_if(moments.has_value() && gated, {4, s.samples, s.channels});
  Tensor coefficients = tensor_if(finishes, {6, s.channels});
  with_element(dtype, [&](auto element, auto scalar) {
    using Element = decltype(element);
    using Scalar = decltype(scalar);
    if (s.rows() == 0) {
      zero<Scalar>(grad_weight), zero<Scalar>(gate_grad), zero<Scalar>(sums), zero<Scalar>(coefficients);
      return;
    }
    const PointwiseBackwardTable& table = pointwise_backward_table();
    const PackedWeight<Scalar> packed(weight, true, table.vector_bytes, table.pack.of(scalar));
    const Scalar* scale = values_of<Scalar>(affine, 2 * s.channels, "affine");
    std::vector<Scalar> to_origin;
    if (any_origin && want_weight && scale == nullptr && !gated) {
      to_origin = affine_to_origin<Scalar>(static_cast<const Element*>(x.const_data_ptr()), s.rows(), s.channels);
      scale = to_origin.data();
    }
    PointwiseBackward<Scalar> p = {
        .tiles = row_tiles(s.rows(), kRowsOfPiece, s.channels + out.channels, kValuesOfTile),
        .channels = s.channels,
        .outputs = out.channels,
        .positions = s.positions(),
        .grad = map_values(grad, out, dtype, "grad"),
        .y = behind_norm ? map_values(y, out, dtype, "y") : nullptr,
        .coefficients = behind_norm ? values_of<Scalar>(y_coefficients, 6 * out.channels, "y_coefficients") : nullptr,
        .x = x.const_data_ptr(),
        .weight = packed.data,
        .weight_stride = packed.stride,
        .scale = scale,
        .shift = scale == nullptr ? nullptr : scale + s.channels,
        .center = values_of<Scalar>(moments, 2 * s.channels, "moments"),  // its first row
        .gate = values_of<Scalar>(gate, s.samples * s.channels, "gate"),
        .residual_grad = map_values(residual_grad, s, dtype, "residual_grad"),
        .activation = function,
        .grad_x = want_x ? grad_x.mutable_data_ptr() : nullptr,
        .want_weight = want_weight,
    };
    const auto values = [](Tensor& t) { return t.numel() == 0 ? nullptr : static_cast<Scalar*>(t.mutable_data_ptr()); };
    backward(
        p, element, s.samples, wide,
        {values(grad_weight), values(gate_grad), values(sums), finishes ? row_of<Scalar>(coefficients, 4) : nullptr});
  });
  if (finishes) finish_coefficients(coefficients, s.rows(), {*affine, *moments, eps, frozen});
  return {grad_x, grad_weight, gate_grad, sums, coefficients};
}

}  // namespace biasloss
