#include <tuple>

#include "march.h"
#include "ops.h"
#include "plain.h"

namespace biasloss {
namespace {

template <class T, class Scalar>
struct Forward {
  const DepthwiseKernels<T, Scalar>& kernels;
  Convolution conv;
  MapShape in, out;
  const T* x;
  Affine<Scalar> affine;
  T* y;

  // One piece; `moments` null: not wanted.
  void piece(Range samples, Range rows, Range channels, const Scalar* weight, Scalar* moments) const {
    const int64_t vectors = vectors_of(channels.size(), kernels.lanes);
    auto ring = Scratch::lay_out(
        [&](Scratch& scratch) { return Ring<Scalar>(scratch, conv.kernel, in.width, conv, vectors, kernels.lanes); });
    ring.clear();
    const auto convolve = of(kernels.convolve, conv);
    RunningMoments<Scalar> running = {moments, 0};
    for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
      const T* from = x + sample * in.positions() * in.channels + channels.begin;
      T* to = y + sample * out.positions() * in.channels + channels.begin;
      int64_t next = conv.inputs(rows.begin, in.height).begin;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Range inputs = conv.inputs(row, in.height);
        for (; next < inputs.end; ++next)
          kernels.activate({from + next * in.width * in.channels, in.channels}, {in.width, channels.size()},
                           affine.at(channels.begin), ring[next]);
        convolve(input_taps(ring, conv, row, inputs), weight, {out.width, channels.size()},
                 {to + row * out.width * in.channels, in.channels}, running);
        running.count += out.width;
      }
    }
  }
};

struct ForwardTensors {
  const Tensor &x, &weight;
  const OptionalTensor& affine;
  Activation activation;
  int64_t stride;
  bool same_padding, want_statistics;
};

template <class T, class Scalar>
std::tuple<Tensor, Tensor> depthwise(const ForwardTensors& of, const NormArguments& norm, T element) {
  const Tensor &x = of.x, &weight = of.weight;
  const MapShape in = map_shape(x, "x");
  const Convolution conv = convolution(weight, in, of.stride, of.same_padding);
  const MapShape out = conv.output(in);
  Tensor y = empty_map(out, x.scalar_type());

  const auto& kernels = depthwise_tables().of(element);
  const int64_t bytes = conv.kernel * strip_columns(in.width, conv.kernel) * int64_t(sizeof(Scalar));
  const Partition partition(in.samples, out.height, ChannelBlocks(in.channels, kernels.lanes, bytes));
  const auto weights = packed(kernels, partition, values_of<Scalar>(weight, in.channels * conv.taps(), "weight"),
                              conv.taps(), 1, conv.taps());
  const Forward<T, Scalar> forward = {
      kernels,
      conv,
      in,
      out,
      static_cast<const T*>(x.const_data_ptr()),
      affine_of(values_of<Scalar>(of.affine, 2 * in.channels, "affine"), in.channels, of.activation),
      static_cast<T*>(y.mutable_data_ptr())};

  const int64_t moments_size = partition.vectors() * 3 * kernels.lanes;
  std::vector<Scalar> partial(static_cast<size_t>(of.want_statistics ? partition.partials() * moments_size : 0));
  for_each_piece(partition, out.rows() * in.channels * conv.taps(), [&](int64_t at, int64_t block) {
    const int64_t first = partition.first_vector(block) * kernels.lanes;
    forward.piece(partition.samples_of(at), partition.rows_of(at), partition.channels_of(block),
                  weights.data() + first * conv.taps(),
                  of.want_statistics ? partial.data() + at * moments_size + first * 3 : nullptr);
  });
  if (!of.want_statistics) return {y, empty_tensor({0}, dtype_of<Scalar>)};
  return {y, finished_statistics(kernels, partition, partial, out, norm)};
}

}  // namespace

std::tuple<Tensor, Tensor> depthwise_cpu(Tensor x, Tensor weight, OptionalTensor affine, int64_t activation,
                                         int64_t stride, bool same_padding, bool want_statistics,
                                         OptionalTensor norm_weight, OptionalTensor norm_bias,
                                         OptionalTensor running_mean, OptionalTensor running_var,
                                         OptionalTensor num_batches_tracked, double momentum, double eps) {
  const Activation function = checked_activation(activation, "activation");
  if (!affine.has_value() && function == Activation::identity && !want_statistics && plain_depthwise_runs(x))
    return {plain_depthwise(x, weight, stride, same_padding), empty_tensor({0}, x.scalar_type())};
  return with_element(x.scalar_type(), [&](auto element, auto accumulator) {
    return depthwise<decltype(element), decltype(accumulator)>(
        {x, weight, affine, function, stride, same_padding, want_statistics},
        {norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, momentum, eps}, element);
  });
}

}  // namespace biasloss
