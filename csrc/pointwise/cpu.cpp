#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "../batch_norm/finish.h"
#include "../cpu/activation.h"
#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "../math/moments.h"
#include "ops.h"
#include "pointwise_simd.h"
#include "weight.h"

namespace biasloss {
namespace {

// A tile of x and of y, which leaves room for the weight in the second cache.
constexpr int64_t kValuesOfTile = 96 * 1024;
// Multiply-adds that take as long as one element of other work.
constexpr int64_t kProductsPerElement = 16;

// The moments of every piece, merged in order.
template <class Scalar>
void merge_pieces(const RowTiles& tiles, int64_t outputs, const double* partial, Scalar* moments) {
  std::vector<Moments<double>> total(outputs, Moments<double>{0, 0, 0});
  for (int64_t piece = 0; piece < tiles.pieces; ++piece) {
    const double count =
        double(tiles.begin((piece + 1) * tiles.tiles_per_piece) - tiles.begin(piece * tiles.tiles_per_piece));
    const double *mean = partial + 2 * piece * outputs, *m2 = mean + outputs;
    for (int64_t k = 0; count > 0 && k < outputs; ++k) total[k] = merge(total[k], {count, mean[k], m2[k]});
  }
  for (int64_t k = 0; k < outputs; ++k) {
    moments[k] = Scalar(total[k].mean);
    moments[outputs + k] = Scalar(tiles.rows == 0 ? 0.0 : total[k].m2 / double(tiles.rows));
  }
}

// Columns of y for one thread where there are fewer pieces of rows than threads: whole lines, in equal parts.
struct Groups {
  Groups(int64_t outputs, int64_t pieces) : outputs(outputs), lines((outputs + kLine - 1) / kLine) {
    const int64_t threads = torch::stable::get_num_threads();
    count = std::clamp<int64_t>((threads + pieces - 1) / pieces, 1, std::max<int64_t>(lines / 2, 1));
  }
  int64_t begin(int64_t group) const { return std::min(lines * group / count * kLine, outputs); }

  static constexpr int64_t kLine = 16;
  int64_t outputs, lines, count;
};

template <class Element, class Scalar>
void forward(PointwiseForward<Scalar>& p, Element element, Scalar* moments) {
  const PointwiseForwardTable& table = pointwise_forward_table();
  const Groups groups(p.outputs, p.tiles.pieces);
  const int64_t units = p.tiles.pieces * groups.count, rows = p.tiles.rows;
  std::vector<double> partial(p.want_moments ? 2 * p.tiles.pieces * p.outputs : 0);
  const int64_t bytes = table.scratch_bytes(p.tiles, p.channels, p.outputs, sizeof(Scalar));
  const int64_t work = rows * (p.channels + p.outputs) + rows * p.channels * p.outputs / kProductsPerElement;
  parallel_shares(work, [&](int64_t share, int64_t shares) {
    void* scratch = Scratch::lay_out([bytes](Scratch& s) { return s.take<char>(bytes); });
    for (int64_t unit = units * share / shares; unit < units * (share + 1) / shares; ++unit) {
      const int64_t piece = unit / groups.count, first = groups.begin(unit % groups.count);
      double* mean = p.want_moments ? partial.data() + 2 * piece * p.outputs + first : nullptr;
      table.piece.of(element)(p, piece, first, groups.begin(unit % groups.count + 1) - first, scratch, mean,
                              mean + (p.want_moments ? p.outputs : 0));
    }
  });
  if (p.want_moments) merge_pieces(p.tiles, p.outputs, partial.data(), moments);
}

}  // namespace

std::tuple<Tensor, Tensor> pointwise_cpu(Tensor x, Tensor weight, OptionalTensor affine, int64_t activation,
                                         OptionalTensor gate, OptionalTensor bias, int64_t output_activation,
                                         OptionalTensor residual, bool want_statistics, OptionalTensor norm_weight,
                                         OptionalTensor norm_bias, OptionalTensor running_mean,
                                         OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                         double momentum, double eps) {
  const MapShape s = map_shape(x, "x");
  const ScalarType dtype = x.scalar_type(), wide = accumulation_dtype(dtype);
  const Activation of_input = checked_activation(activation, "activation");
  const Activation of_output = checked_activation(output_activation, "output_activation");
  const bool by_vectors = is_by_vectors(weight);
  const int64_t outputs = by_vectors && bias.has_value() ? bias->numel() : weight.size(0);
  if (!by_vectors) check_weight(weight, s.channels, wide);
  STD_TORCH_CHECK(affine.has_value() || of_input == Activation::identity, "an activation needs affine, got activation ",
                  activation, " alone");
  const MapShape out = {s.samples, outputs, s.height, s.width};
  Tensor y = empty_map(out, dtype);
  Tensor statistics = want_statistics ? empty_tensor({4, out.channels}, wide) : empty_tensor({0}, wide);
  with_element(dtype, [&](auto element, auto scalar) {
    using Scalar = decltype(scalar);
    const PointwiseForwardTable& table = pointwise_forward_table();
    const auto packed = by_vectors ? PackedWeight<Scalar>(weight, s.channels, outputs, dtype, table.vector_bytes)
                                   : PackedWeight<Scalar>(weight, false, table.vector_bytes, table.pack.of(scalar));
    const Scalar* scale = values_of<Scalar>(affine, 2 * s.channels, "affine");
    PointwiseForward<Scalar> p = {
        .tiles = row_tiles(s.rows(), 54, s.channels + out.channels, kValuesOfTile),
        .channels = s.channels,
        .outputs = out.channels,
        .positions = s.positions(),
        .x = x.const_data_ptr(),
        .weight = packed.data,
        .weight_stride = packed.stride,
        .by_vectors = packed.by_vectors,
        .scale = scale,
        .shift = scale == nullptr ? nullptr : scale + s.channels,
        .gate = values_of<Scalar>(gate, s.samples * s.channels, "gate"),
        .bias = values_of<Scalar>(bias, out.channels, "bias"),
        .residual = map_values(residual, out, dtype, "residual"),
        .activation = of_input,
        .output_activation = of_output,
        .y = y.mutable_data_ptr(),
        .want_moments = want_statistics,
    };
    forward(p, element, want_statistics ? static_cast<Scalar*>(statistics.mutable_data_ptr()) : nullptr);
  });
  finish_statistics_if_wanted(statistics, out.rows(),
                              {norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, momentum, eps});
  return {y, statistics};
}

}  // namespace biasloss
