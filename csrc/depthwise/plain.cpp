#include "plain.h"

#include "backward.h"
#include "plain_simd.h"

namespace biasloss {
namespace {

template <class Scalar>
struct Plain {
  MapShape in;
  Convolution conv;
  MapShape out;
  Partition partition;
  const DepthwiseKernels<Scalar, Scalar>& packing;
  const PlainKernels<Scalar>& kernels;
  std::vector<Scalar> weights;

  // `more_rows` than the kernel's are passed over at a time.
  Plain(const Tensor& x, const Tensor& weight, int64_t stride, int64_t more_rows)
      : in(map_shape(x, "x")),
        conv(convolution(weight, in.channels, stride)),
        out(conv.output(in)),
        partition(in.samples, out.height,
                  ChannelBlocks(in.channels, depthwise_tables().of(Scalar()).lanes,
                                (conv.kernel + more_rows) * in.width * int64_t(sizeof(Scalar)))),
        packing(depthwise_tables().of(Scalar())),
        kernels(plain_tables().of(Scalar())),
        weights(packed(packing, partition, values_of<Scalar>(weight, in.channels * conv.taps(), "weight"), conv.taps(),
                       1, conv.taps())) {}

  const Scalar* weights_of(int64_t block) const {
    return weights.data() + partition.first_vector(block) * packing.lanes * conv.taps();
  }

  void convolve(const Scalar* x, Range samples, Range rows, Range channels, const Scalar* weight, Scalar* y) const {
    for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
      const Scalar* from = x + sample * in.positions() * in.channels + channels.begin;
      Scalar* to = y + sample * out.positions() * in.channels + channels.begin;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        MapTaps<Scalar> taps = {};
        taps.width = in.width;
        const Range inputs = conv.inputs(row, in.height);
        for (int64_t r = inputs.begin; r < inputs.end; ++r)
          taps.add(from + r * in.width * in.channels, r - (row * conv.stride - conv.padding()));
        of(kernels.convolve, conv)(taps, weight, {out.width, channels.size()},
                                   {to + row * out.width * in.channels, in.channels});
      }
    }
  }

  // `rows` of dy; those of x that lie under them.
  void gradients(const Scalar* dy, const Scalar* x, Range samples, Range rows, Range channels, const Scalar* weight,
                 Scalar* grad_x, Scalar* grad_weight) const {
    for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
      const Scalar* from = dy + sample * out.positions() * in.channels + channels.begin;
      const int64_t end = std::min(in.height, rows.end * conv.stride);
      for (int64_t row = rows.begin * conv.stride; row < end; ++row) {
        MapTaps<Scalar> taps = {};
        taps.width = out.width;
        const Range outputs = conv.outputs(row, out.height);
        for (int64_t o = outputs.begin; o < outputs.end; ++o)
          taps.add(from + o * out.width * in.channels, row + conv.padding() - o * conv.stride);
        const int64_t offset = (sample * in.height + row) * in.width * in.channels + channels.begin;
        of(kernels.gradients, conv)(taps, weight, {in.width, channels.size()}, in.channels,
                                    {x + offset, grad_x == nullptr ? nullptr : grad_x + offset, grad_weight});
      }
    }
  }
};

template <class Scalar>
Tensor forward(const Tensor& x, const Tensor& weight, int64_t stride) {
  const Plain<Scalar> plain(x, weight, stride, 0);
  Tensor y = empty_map(plain.out, x.scalar_type());
  const auto* from = static_cast<const Scalar*>(x.const_data_ptr());
  auto* to = static_cast<Scalar*>(y.mutable_data_ptr());
  const Partition& partition = plain.partition;
  for_each_piece(partition, plain.out.rows() * plain.in.channels * plain.conv.taps(), [&](int64_t at, int64_t block) {
    plain.convolve(from, partition.samples_of(at), partition.rows_of(at), partition.channels_of(block),
                   plain.weights_of(block), to);
  });
  return y;
}

template <class Scalar>
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t stride,
                                    bool want_x, bool want_weight) {
  const Plain<Scalar> plain(x, weight, stride, 2);
  const MapShape& in = plain.in;
  const Convolution& conv = plain.conv;
  const Partition& partition = plain.partition;
  const ScalarType dtype = x.scalar_type();
  Tensor grad_x = want_x ? empty_map(in, dtype) : empty_tensor({0}, dtype);
  Tensor grad_weight =
      want_weight ? empty_tensor({in.channels, 1, conv.kernel, conv.kernel}, dtype) : empty_tensor({0}, dtype);
  const auto *from = map_values<Scalar>(dy, plain.out, "grad"), *at_x = static_cast<const Scalar*>(x.const_data_ptr());
  auto* to = want_x ? static_cast<Scalar*>(grad_x.mutable_data_ptr()) : nullptr;

  const int64_t lanes = plain.packing.lanes, size = partition.vectors() * lanes * conv.taps();
  std::vector<Scalar> partial(want_weight ? partition.partials() * size : 0);
  if (want_x || want_weight)
    for_each_piece(partition, 2 * in.rows() * in.channels * conv.taps(), [&](int64_t at, int64_t block) {
      plain.gradients(
          from, at_x, partition.samples_of(at), partition.rows_of(at), partition.channels_of(block),
          plain.weights_of(block), to,
          want_weight ? partial.data() + at * size + partition.first_vector(block) * lanes * conv.taps() : nullptr);
    });
  if (want_weight) {
    merge_sums(partial.data(), partition.partials(), size);
    unpack(plain.packing, partition, partial.data(), conv.taps(), static_cast<Scalar*>(grad_weight.mutable_data_ptr()),
           conv.taps(), 1);
  }
  return {grad_x, grad_weight};
}

}  // namespace

bool plain_depthwise_runs(const Tensor& x) {
  const int64_t channels = map_shape(x, "x").channels;
  if (x.scalar_type() == ScalarType::Float) return channels >= depthwise_tables().float32.lanes;
  return x.scalar_type() == ScalarType::Double && channels >= depthwise_tables().float64.lanes;
}

Tensor plain_depthwise(const Tensor& x, const Tensor& weight, int64_t stride) {
  return x.scalar_type() == ScalarType::Float ? forward<float>(x, weight, stride) : forward<double>(x, weight, stride);
}

std::tuple<Tensor, Tensor> plain_depthwise_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                    int64_t stride, bool want_x, bool want_weight) {
  return x.scalar_type() == ScalarType::Float ? backward<float>(dy, x, weight, stride, want_x, want_weight)
                                              : backward<double>(dy, x, weight, stride, want_x, want_weight);
}

}  // namespace biasloss
