#include <tuple>

#include "expanded_rows.h"
#include "ops.h"

namespace biasloss {
namespace {

template <class T, class Scalar>
std::tuple<Tensor, Tensor> expand_depthwise(const Expansion<T, Scalar>& e, const Tensor& expand_weight,
                                            const Tensor& weight, ScalarType dtype, bool want_moments) {
  const Convolution conv = e.conv;
  const MapShape out = {e.in.samples, e.channels, conv.output_size(e.in.height), conv.output_size(e.in.width)};
  const ScalarType wide = accumulation_dtype(dtype);
  const auto& kernels = depthwise_tables().of(T());
  const Partition partition(e.in.samples, out.height, ChannelBlocks(e.channels, kernels.lanes, e.bytes_a_channel()));
  const PackedExpansion<T, Scalar> expand(
      e, partition, values_of<Scalar>(expand_weight, e.channels * e.in.channels, "expand_weight"));
  const auto weights = packed(kernels, partition, values_of<Scalar>(weight, e.channels * conv.taps(), "weight"),
                              conv.taps(), 1, conv.taps());
  Tensor y = empty_map(out, dtype);
  T* const to = static_cast<T*>(y.mutable_data_ptr());
  const int64_t moments_size = partition.vectors() * 3 * kernels.lanes;
  std::vector<Scalar> partial(static_cast<size_t>(want_moments ? partition.partials() * moments_size : 0));

  const auto piece = [&](int64_t at, int64_t block) {
    const Range samples = partition.samples_of(at), rows = partition.rows_of(at);
    const Range channels = partition.channels_of(block);
    const int64_t first = partition.first_vector(block) * kernels.lanes;
    auto expanded = Scratch::lay_out(
        [&](Scratch& scratch) { return ExpandedRows<T, Scalar>(e, scratch, channels.size(), expand.stride); });
    expanded.h.clear();
    RunningMoments<Scalar> moments = {want_moments ? partial.data() + at * moments_size + first * 3 : nullptr, 0};
    for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
      const Range needed = {conv.inputs(rows.begin, e.in.height).begin, conv.inputs(rows.end - 1, e.in.height).end};
      expanded.begin(sample, needed, channels, expand.block(block));
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Range inputs = conv.inputs(row, e.in.height);
        expanded.advance(inputs.end);
        of(kernels.convolve, conv)(
            input_taps(expanded.h, conv, row, inputs), weights.data() + first * conv.taps(),
            {out.width, channels.size()},
            {to + (sample * out.positions() + row * out.width) * out.channels + channels.begin, out.channels}, moments);
        moments.count += out.width;
      }
    }
  };
  for_each_piece(partition, e.in.rows() * e.channels * e.in.channels + out.rows() * e.channels * conv.taps(), piece);
  return {y, want_moments ? finished_moments(kernels, partition, partial, out, wide) : empty_tensor({0}, wide)};
}

}  // namespace

std::tuple<Tensor, Tensor> expand_depthwise_cpu(Tensor x, Tensor expand_weight, Tensor affine, int64_t activation,
                                                Tensor weight, int64_t stride, bool want_moments) {
  return with_element(x.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Scalar = decltype(accumulator);
    return expand_depthwise(expansion_of<T, Scalar>(x, expand_weight, affine, activation, weight, stride),
                            expand_weight, weight, x.scalar_type(), want_moments);
  });
}

}  // namespace biasloss
