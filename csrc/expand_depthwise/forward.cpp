#include <memory>
#include <tuple>

#include "activated_simd.h"
#include "expanded_rows.h"
#include "ops.h"

namespace biasloss {
namespace {

template <class T, class Scalar>
MapShape output_of(const Expansion<T, Scalar>& e) {
  return {e.in.samples, e.channels, e.conv.output_size(e.in.height), e.conv.output_size(e.in.width)};
}

// A depthwise weight in either of its layouts, packed.
template <class T, class Scalar>
std::vector<Scalar> packed_taps(const Expansion<T, Scalar>& e, const Partition& partition, const Tensor& weight) {
  const int64_t kernel = e.conv.kernel, tap = weight.stride(3);
  if (weight.stride(0) != 1 || weight.stride(2) != kernel * tap)
    return packed(e.rows, partition, values_of<Scalar>(weight, e.channels * e.conv.taps(), "weight"), e.conv.taps(), 1,
                  e.conv.taps());
  STD_TORCH_CHECK(weight.scalar_type() == dtype_of<Scalar>, "weight: expected the accumulation dtype of x");
  return packed(e.rows, partition, static_cast<const Scalar*>(weight.const_data_ptr()), 1, tap, e.conv.taps());
}

// Where a row of the output lies: which partial result, which channels, and how many rows were before it in its piece.
struct Place {
  int64_t partial, first_vector;
  Range channels;
  int64_t sample, row, before;
};

// Calls body(place, taps) for every row of the output and every block of channels, on several threads.
template <class T, class Scalar, class Body>
void for_each_row(const Expansion<T, Scalar>& e, const Partition& partition, const Tensor& expand_weight,
                  const Body& body) {
  const MapShape out = output_of(e);
  const PackedWeight<Scalar> expand = packed_expansion(e, expand_weight);
  const int64_t multiply_adds = e.in.rows() * e.channels * e.in.channels + out.rows() * e.channels * e.conv.taps();
  for_each_share(partition, multiply_adds, [&](Range pieces) {
    auto expanded = Scratch::lay_out(
        [&](Scratch& scratch) { return ExpandedRows<T, Scalar>(e, scratch, partition.most_channels(), expand); });
    expanded.h.clear();
    for (int64_t piece = pieces.begin; piece < pieces.end; ++piece) {
      const int64_t partial = partition.partial(piece), block = partition.block(piece);
      const Range samples = partition.samples_of(partial), rows = partition.rows_of(partial);
      const Range inputs = {e.conv.inputs(rows.begin, e.in.height).begin, e.conv.inputs(rows.end - 1, e.in.height).end};
      Place at = {partial, partition.first_vector(block), partition.channels_of(block), samples.begin, 0, 0};
      while (at.sample < samples.end) {
        const Range run = run_of({at.sample, samples.end}, rows, out.height);
        expanded.begin({run.begin * e.in.height + inputs.begin, (run.end - 1) * e.in.height + inputs.end}, at.channels);
        for (; at.sample < run.end; ++at.sample) {
          const int64_t before = at.sample * e.in.height;
          for (at.row = rows.begin; at.row < rows.end; ++at.row, ++at.before) {
            const Range reads = e.conv.inputs(at.row, e.in.height);
            expanded.advance(before + reads.end);
            body(at, input_taps(expanded.h, e.conv, at.row, reads, before));
          }
        }
      }
    }
  });
}

// norm null: no statistics.
template <class T, class Scalar>
std::tuple<Tensor, Tensor> expand_depthwise(const Expansion<T, Scalar>& e, const Tensor& expand_weight,
                                            const Tensor& weight, ScalarType dtype, const NormArguments* norm) {
  const MapShape out = output_of(e);
  const bool want_moments = norm != nullptr;
  const auto& kernels = depthwise_tables().of(T());
  const Partition partition(e.in.samples, out.height, ChannelBlocks(e.channels, kernels.lanes, e.bytes_a_channel()));
  const auto weights = packed_taps(e, partition, weight);
  Tensor y = empty_map(out, dtype);
  T* const to = static_cast<T*>(y.mutable_data_ptr());
  const int64_t moments_size = partition.vectors() * 3 * kernels.lanes;
  std::vector<Scalar> partial(static_cast<size_t>(want_moments ? partition.partials() * moments_size : 0));

  for_each_row(e, partition, expand_weight, [&](const Place& at, const Taps<Scalar>& taps) {
    const int64_t first = at.first_vector * kernels.lanes;
    RunningMoments<Scalar> moments = {want_moments ? partial.data() + at.partial * moments_size + first * 3 : nullptr,
                                      at.before * out.width};
    of(kernels.convolve, e.conv)(
        taps, weights.data() + first * e.conv.taps(), {out.width, at.channels.size()},
        {to + (at.sample * out.positions() + at.row * out.width) * out.channels + at.channels.begin, out.channels},
        moments);
  });
  if (!want_moments) return {y, empty_tensor({0}, dtype_of<Scalar>)};
  return {y, finished_statistics(kernels, partition, partial, out, *norm)};
}

// The means over each sample's rows from the sums of every row, (samples, height, channels).
template <class Scalar>
void average_rows(const Scalar* sums, const MapShape& out, Scalar* mean) {
  parallel_shares(out.samples * out.height * out.channels, [&](int64_t share, int64_t shares) {
    std::vector<double> total(static_cast<size_t>(out.channels));
    const Range samples = part_of(out.samples, shares, share);
    for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
      std::fill(total.begin(), total.end(), 0.0);
      const Scalar* row = sums + sample * out.height * out.channels;
      for (int64_t i = 0; i < out.height; ++i, row += out.channels)
        for (int64_t c = 0; c < out.channels; ++c) total[c] += double(row[c]);
      const double scale = 1.0 / double(out.positions());
      for (int64_t c = 0; c < out.channels; ++c) mean[sample * out.channels + c] = Scalar(total[c] * scale);
    }
  });
}

template <class T, class Scalar>
std::tuple<Tensor, Tensor> expand_depthwise_activate(const Expansion<T, Scalar>& e, const Tensor& expand_weight,
                                                     const Tensor& weight, Affine<Scalar> y_affine, ScalarType dtype,
                                                     bool want_pool) {
  const MapShape out = output_of(e);
  const ScalarType wide = accumulation_dtype(dtype);
  const auto& kernels = activated_tables().of(T());
  // Nothing is merged that depends on the pieces: there may be as many as suits the threads. Those of a team take the
  // next piece when they are done: with two for each, one that is held up holds up less.
  const int64_t threads = team_size() > 1 ? 2 * team_size() : torch::stable::get_num_threads();
  constexpr int64_t kCacheBytes = 384 << 10;  // more than elsewhere: fewer pieces, each of which reads x again
  ChannelBlocks blocks(e.channels, e.rows.lanes, e.bytes_a_channel(), kCacheBytes);
  if (e.in.samples < threads) blocks.share_among(threads);
  const Partition partition(e.in.samples, out.height, blocks, Partition::kPieces, threads);
  const auto weights = packed_taps(e, partition, weight);
  Tensor h = empty_map(out, dtype);
  Tensor pooled = want_pool ? empty_tensor({out.samples, out.channels}, wide) : empty_tensor({0}, wide);
  T* const to = static_cast<T*>(h.mutable_data_ptr());
  const auto row_sums = std::make_unique_for_overwrite<Scalar[]>(
      static_cast<size_t>(want_pool ? out.samples * out.height * out.channels : 0));
  if (want_pool && out.rows() == 0) std::fill_n(row_sums.get(), out.samples * out.height * out.channels, Scalar(0));

  for_each_row(e, partition, expand_weight, [&](const Place& at, const Taps<Scalar>& taps) {
    const int64_t row = (at.sample * out.height + at.row) * out.channels, c = at.channels.begin;
    of(kernels.convolve, e.conv)(
        taps, weights.data() + at.first_vector * e.rows.lanes * e.conv.taps(), {out.width, at.channels.size()},
        {{to + row * out.width + c, out.channels}, y_affine.at(c), want_pool ? row_sums.get() + row + c : nullptr});
  });
  if (want_pool) average_rows(row_sums.get(), out, static_cast<Scalar*>(pooled.mutable_data_ptr()));
  return {h, pooled};
}

}  // namespace

std::tuple<Tensor, Tensor> expand_depthwise_cpu(Tensor x, Tensor expand_weight, Tensor affine, Tensor weight,
                                                int64_t activation, int64_t stride, bool same_padding,
                                                bool want_statistics, OptionalTensor norm_weight,
                                                OptionalTensor norm_bias, OptionalTensor running_mean,
                                                OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                double momentum, double eps) {
  const Activation function = checked_activation(activation, "activation");
  const NormArguments norm = {norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, momentum, eps};
  return with_element(x.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Scalar = decltype(accumulator);
    return expand_depthwise(expansion_of<T, Scalar>(x, expand_weight, affine, function, weight, stride, same_padding),
                            expand_weight, weight, x.scalar_type(), want_statistics ? &norm : nullptr);
  });
}

std::tuple<Tensor, Tensor> expand_depthwise_activate_cpu(Tensor x, Tensor expand_weight, Tensor affine, Tensor weight,
                                                         Tensor y_affine, int64_t activation, int64_t stride,
                                                         bool same_padding, int64_t y_activation, bool want_pool) {
  const Activation function = checked_activation(activation, "activation");
  const Activation of_output = checked_activation(y_activation, "y_activation");
  return with_element(x.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Scalar = decltype(accumulator);
    const auto e = expansion_of<T, Scalar>(x, expand_weight, affine, function, weight, stride, same_padding);
    const Scalar* of_y = values_of<Scalar>(y_affine, 2 * e.channels, "y_affine");
    return expand_depthwise_activate(e, expand_weight, weight, affine_of(of_y, e.channels, of_output), x.scalar_type(),
                                     want_pool);
  });
}

}  // namespace biasloss
