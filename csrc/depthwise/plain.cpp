#include "plain.h"

#include "../cpu/fresh_pages.h"
#include "backward.h"
#include "plain_simd.h"

namespace biasloss {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of the rows that the kernel spans, for a block of channels
constexpr int64_t kBandBytes = 128 << 10;   // of the rows of x in a band: with y, and what is fetched, less than L2

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
  Plain(const Tensor& x, const Tensor& weight, int64_t stride, bool same_padding, int64_t more_rows)
      : in(map_shape(x, "x")),
        conv(convolution(weight, in, stride, same_padding)),
        out(conv.output(in)),
        partition(in.samples, out.height,
                  ChannelBlocks(in.channels, depthwise_tables().of(Scalar()).lanes,
                                (conv.kernel + more_rows) * in.width * int64_t(sizeof(Scalar)), kBlockBytes)),
        packing(depthwise_tables().of(Scalar())),
        kernels(plain_tables().of(Scalar())),
        weights(packed(packing, partition, values_of<Scalar>(weight, in.channels * conv.taps(), "weight"), conv.taps(),
                       1, conv.taps())) {}

  const Scalar* weights_of(int64_t block) const {
    return weights.data() + partition.first_vector(block) * packing.lanes * conv.taps();
  }

  void convolve(const Scalar* x, Range samples, Range rows, Range channels, const Scalar* weight, Scalar* y) const {
    for_each_band(samples, rows, conv.stride, channels, [&](int64_t sample, const Band& band) {
      const int64_t row = sample * in.height + conv.inputs(band.end - 1, in.height).end;
      const int64_t count = band.end - band.begin, out_row = sample * out.height + band.end;
      const NextBand next = {{upcoming(x, in, row, count * conv.stride), upcoming(y, out, out_row, count)}};
      take_rows(y, out, sample * out.height + band.begin, count);
      of(kernels.convolve, conv)(x + first_of(in, sample, channels), weight, band, y + first_of(out, sample, channels),
                                 next);
    });
  }

  // `rows` of dy; those of x that lie under them. The maps are given by their first values.
  void gradients(const PlainGradients<Scalar>& maps, const Scalar* residual_grad, Range samples, Range rows,
                 Range channels, const Scalar* weight) const {
    const auto *dy = maps.dy, *x = maps.x;
    auto *grad_x = maps.grad_x, *grad_weight = maps.grad_weight;
    const Range of_x = {rows.begin * conv.stride, std::min(in.height, rows.end * conv.stride)};
    for_each_band(samples, of_x, 1, channels, [&](int64_t sample, const Band& band) {
      const int64_t row = sample * in.height + band.end, count = band.end - band.begin;
      const int64_t out_row = sample * out.height + conv.outputs(band.end - 1, out.height).end;
      const NextBand next = {{upcoming(x, in, row, grad_weight == nullptr ? 0 : count),
                              upcoming(dy, out, out_row, divide_up(count, conv.stride)),
                              upcoming(grad_x, in, row, grad_x == nullptr ? 0 : count)}};
      if (grad_x != nullptr) take_rows(grad_x, in, sample * in.height + band.begin, count);
      const int64_t offset = first_of(in, sample, channels);
      of(kernels.gradients, conv)({dy + first_of(out, sample, channels), x + offset,
                                   grad_x == nullptr ? nullptr : grad_x + offset, grad_weight},
                                  weight, band, next);
      if (grad_x != nullptr && residual_grad != nullptr) add(residual_grad + offset, band, grad_x + offset);
    });
  }

 private:
  // The rows of a band, which is still in cache.
  static void add(const Scalar* map, const Band& band, Scalar* to) {
    for (int64_t column = band.begin * band.width; column < band.end * band.width; ++column)
      for (int64_t c = 0; c < band.channels; ++c) to[column * band.distance + c] += map[column * band.distance + c];
  }

  static int64_t first_of(const MapShape& map, int64_t sample, Range channels) {
    return sample * map.positions() * map.channels + channels.begin;
  }

  // `rows` of every sample in bands; a row takes `stride` rows of x.
  template <class Function>
  void for_each_band(Range samples, Range rows, int64_t stride, Range channels, const Function& function) const {
    const int64_t row_bytes = std::max<int64_t>(1, stride * in.width * channels.size() * int64_t(sizeof(Scalar)));
    const int64_t bands = divide_up(rows.size(), std::max<int64_t>(1, kBandBytes / row_bytes));
    Band band = {in.height,   in.width,       out.height,        out.width, channels.size(),
                 in.channels, conv.row_shift, conv.column_shift, 0,         0};
    for (int64_t sample = samples.begin; sample < samples.end; ++sample)
      for (int64_t i = 0; i < bands; ++i) {
        const Range of_band = part_of(rows.size(), bands, i);
        band.begin = rows.begin + of_band.begin, band.end = rows.begin + of_band.end;
        function(sample, band);
      }
  }

  // Pages for rows that are about to be written. Those of other blocks of channels lie in the same pages.
  void take_rows(const Scalar* map, const MapShape& shape, int64_t row, int64_t count) const {
    const int64_t row_bytes = shape.width * shape.channels * int64_t(sizeof(Scalar));
    if (partition.blocks() == 1 && shape.samples * shape.height * row_bytes >= kLeastBytesToAskAbout)
      take_pages(map + row * shape.width * shape.channels, count * row_bytes);
  }

  // Rows of a map, numbered through its samples. Where there are several blocks of channels, each would fetch the
  // others' too: nothing is fetched.
  NextBand::Stream upcoming(const Scalar* map, const MapShape& shape, int64_t row, int64_t count) const {
    const int64_t rows = shape.samples * shape.height;
    if (partition.blocks() > 1 || count == 0 || row >= rows) return {nullptr, nullptr};
    const Scalar* begin = map + row * shape.width * shape.channels;
    const Scalar* end = begin + std::min(count, rows - row) * shape.width * shape.channels;
    return {reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end)};
  }
};

template <class Scalar>
Tensor forward(const Tensor& x, const Tensor& weight, int64_t stride, bool same_padding) {
  const Plain<Scalar> plain(x, weight, stride, same_padding, 0);
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
std::tuple<Tensor, Tensor> backward(const PlainBackward& of) {
  const Plain<Scalar> plain(of.x, of.weight, of.stride, of.same_padding, 2);
  const MapShape& in = plain.in;
  const Convolution& conv = plain.conv;
  const Partition& partition = plain.partition;
  const ScalarType dtype = of.x.scalar_type();
  Tensor grad_x = of.want_x ? empty_map(in, dtype) : empty_tensor({0}, dtype);
  Tensor grad_weight =
      of.want_weight ? empty_tensor({in.channels, 1, conv.kernel, conv.kernel}, dtype) : empty_tensor({0}, dtype);
  const auto* dy = map_values<Scalar>(of.dy, plain.out, "grad");
  const auto* x = static_cast<const Scalar*>(of.x.const_data_ptr());
  const auto* residual =
      of.residual_grad.has_value() ? map_values<Scalar>(*of.residual_grad, in, "residual_grad") : nullptr;
  auto* to = of.want_x ? static_cast<Scalar*>(grad_x.mutable_data_ptr()) : nullptr;

  const int64_t lanes = plain.packing.lanes, size = partition.vectors() * lanes * conv.taps();
  std::vector<Scalar> partial(of.want_weight ? partition.partials() * size : 0);
  if (of.want_x || of.want_weight)
    for_each_piece(partition, 2 * in.rows() * in.channels * conv.taps(), [&](int64_t at, int64_t block) {
      Scalar* const to_weight =
          of.want_weight ? partial.data() + at * size + partition.first_vector(block) * lanes * conv.taps() : nullptr;
      plain.gradients({dy, x, to, to_weight}, residual, partition.samples_of(at), partition.rows_of(at),
                      partition.channels_of(block), plain.weights_of(block));
    });
  if (of.want_weight) {
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

Tensor plain_depthwise(const Tensor& x, const Tensor& weight, int64_t stride, bool same_padding) {
  return x.scalar_type() == ScalarType::Float ? forward<float>(x, weight, stride, same_padding)
                                              : forward<double>(x, weight, stride, same_padding);
}

std::tuple<Tensor, Tensor> plain_depthwise_backward(const PlainBackward& of) {
  return of.x.scalar_type() == ScalarType::Float ? backward<float>(of) : backward<double>(of);
}

}  // namespace biasloss
