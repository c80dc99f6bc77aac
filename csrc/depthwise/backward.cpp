#include "backward.h"

#include <tuple>

#include "march.h"
#include "ops.h"
#include "plain.h"

namespace biasloss {
namespace {

template <class T, class Scalar>
struct Backward {
  const DepthwiseKernels<T, Scalar>& kernels;
  Convolution conv;
  MapShape in, out;
  DepthwiseGradientAtOutput<T, Scalar> dy;
  const T* x;
  Affine<Scalar> affine;
  const Scalar* center;    // null: no sums
  const T* residual_grad;  // or null
  T* grad_x;               // null: not wanted
  bool want_weight;

  bool want_du() const { return grad_x != nullptr || center != nullptr; }

  void piece(Range samples, Range rows, Range channels, const Scalar* weight, Scalar* grad_weight, Scalar* sums) const {
    const int64_t vectors = vectors_of(channels.size(), kernels.lanes);
    struct Buffers {
      Ring<Scalar> of_h, of_dy;
      Scalar* workspace;
    };
    auto [of_h, of_dy, workspace] = Scratch::lay_out([&](Scratch& scratch) {
      return Buffers{Ring<Scalar>(scratch, conv.kernel, in.width, conv, vectors, kernels.lanes),
                     Ring<Scalar>(scratch, conv.kernel, std::max(in.width, out.width), conv, vectors, kernels.lanes),
                     scratch.take<Scalar>(strip_columns(in.width + conv.column_shift, conv.kernel) * kernels.lanes)};
    });
    of_h.clear();
    of_dy.clear();
    const RowSize in_row = {in.width, channels.size()}, out_row = {out.width, channels.size()};
    const Affine<Scalar> normalize = affine.at(channels.begin);
    for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
      const int64_t offset = sample * in.positions() * in.channels + channels.begin;
      const auto input_row = [&](auto* data, int64_t row) {
        return MapRow<std::remove_pointer_t<decltype(data)>>{
            data == nullptr ? nullptr : data + offset + row * in.width * in.channels, in.channels};
      };
      int64_t next_h = conv.inputs(rows.begin, in.height).begin;
      int64_t next_dy = want_du() ? conv.outputs(rows.begin * conv.stride, out.height).begin : rows.begin;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Range inputs = {row * conv.stride, std::min(in.height, (row + 1) * conv.stride)};
        const int64_t dy_end = want_du() ? conv.outputs(inputs.end - 1, out.height).end : row + 1;
        for (; next_dy < dy_end; ++next_dy)
          kernels.output_gradient(dy.row(out, sample, next_dy, channels.begin), out_row, of_dy[next_dy]);
        if (want_weight) {
          const Range reads = conv.inputs(row, in.height);
          for (; next_h < reads.end; ++next_h) kernels.activate(input_row(x, next_h), in_row, normalize, of_h[next_h]);
          of(kernels.weight_gradient, conv)(of_dy[row], input_taps(of_h, conv, row, reads), out_row, grad_weight);
        }
        for (int64_t r = inputs.begin; want_du() && r < inputs.end; ++r)
          of(kernels.input_gradient, conv)(
              output_taps(of_dy, conv, r, conv.outputs(r, out.height)), weight, in_row,
              {input_row(x, r), input_row(grad_x, r), normalize, center == nullptr ? nullptr : center + channels.begin,
               sums, input_row(residual_grad, r), conv.column_shift},
              workspace);
      }
    }
  }
};

struct BackwardTensors {
  const Tensor &x, &weight;
  const OptionalTensor &affine, &moments;
  Activation activation;
  int64_t stride;
  bool same_padding;
  const OptionalTensor& residual_grad;
  bool want_x, want_weight;

  bool plain() const {
    return !affine.has_value() && activation == Activation::identity && !moments.has_value() && plain_depthwise_runs(x);
  }
};

template <class T, class Scalar>
std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const BackwardTensors& of, const OutputGradientTensors& at_output,
                                                      T element) {
  const Tensor& x = of.x;
  const MapShape in = map_shape(x, "x");
  const Convolution conv = convolution(of.weight, in, of.stride, of.same_padding);
  const MapShape out = conv.output(in);
  const ScalarType wide = accumulation_dtype(x.scalar_type());
  Tensor grad_x = of.want_x ? empty_map(in, x.scalar_type()) : empty_tensor({0}, x.scalar_type());
  Tensor grad_weight =
      of.want_weight ? empty_tensor({in.channels, 1, conv.kernel, conv.kernel}, wide) : empty_tensor({0}, wide);
  const bool finishes = of.moments.has_value();
  Tensor coefficients = finishes ? empty_tensor({6, in.channels}, wide) : empty_tensor({0}, wide);

  const auto& kernels = depthwise_tables().of(element);
  const int64_t columns = strip_columns(in.width, conv.kernel) + strip_columns(out.width, conv.kernel);
  const int64_t bytes = conv.kernel * columns * int64_t(sizeof(Scalar));
  const Partition partition(in.samples, out.height, ChannelBlocks(in.channels, kernels.lanes, bytes));
  const auto weights = packed_for_input_gradient(kernels, partition, conv,
                                                 values_of<Scalar>(of.weight, in.channels * conv.taps(), "weight"));
  const Backward<T, Scalar> backward = {
      kernels,
      conv,
      in,
      out,
      DepthwiseGradientAtOutput<T, Scalar>(at_output, out),
      static_cast<const T*>(x.const_data_ptr()),
      affine_of(values_of<Scalar>(of.affine, 2 * in.channels, "affine"), in.channels, of.activation),
      values_of<Scalar>(of.moments, 2 * in.channels, "moments"),  // its first row
      of.residual_grad.has_value() ? map_values<T>(*of.residual_grad, in, "residual_grad") : nullptr,
      of.want_x ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr,
      of.want_weight};

  const int64_t lanes = partition.vectors() * kernels.lanes;
  std::vector<Scalar> of_weight(of.want_weight ? partition.partials() * lanes * conv.taps() : 0);
  std::vector<Scalar> of_sums(finishes ? partition.partials() * lanes * 2 : 0);
  for_each_piece(partition, 2 * in.rows() * in.channels * conv.taps(), [&](int64_t at, int64_t block) {
    const int64_t first = partition.first_vector(block) * kernels.lanes;
    backward.piece(partition.samples_of(at), partition.rows_of(at), partition.channels_of(block),
                   weights.data() + first * conv.taps(),
                   of.want_weight ? of_weight.data() + (at * lanes + first) * conv.taps() : nullptr,
                   finishes ? of_sums.data() + (at * lanes + first) * 2 : nullptr);
  });
  if (of.want_weight) {
    merge_sums(of_weight.data(), partition.partials(), lanes * conv.taps());
    unpack(kernels, partition, of_weight.data(), conv.taps(), static_cast<Scalar*>(grad_weight.mutable_data_ptr()),
           conv.taps(), 1);
  }
  if (finishes) {
    merge_sums(of_sums.data(), partition.partials(), lanes * 2);
    unpack(kernels, partition, of_sums.data(), 2, row_of<Scalar>(coefficients, 4), 1, in.channels);
  }
  return {grad_x, grad_weight, coefficients};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> depthwise_backward_cpu(Tensor x, Tensor weight, OptionalTensor grad,
                                                          OptionalTensor pool_grad, OptionalTensor y,
                                                          OptionalTensor y_affine, OptionalTensor y_coefficients,
                                                          int64_t y_activation, OptionalTensor affine,
                                                          OptionalTensor moments, int64_t activation, int64_t stride,
                                                          bool same_padding, OptionalTensor residual_grad, bool want_x,
                                                          bool want_weight, double eps, bool frozen) {
  const OutputGradientTensors at_output = {grad,     pool_grad,      y,
                                           y_affine, y_coefficients, checked_activation(y_activation, "y_activation")};
  const BackwardTensors of = {
      x,      weight,       affine,        moments, checked_activation(activation, "activation"),
      stride, same_padding, residual_grad, want_x,  want_weight};
  STD_TORCH_CHECK(affine.has_value() || !moments.has_value(), "moments need affine, got none");
  STD_TORCH_CHECK(!residual_grad.has_value() || !moments.has_value(),
                  "expected residual_grad or moments, got both: the gradient behind a normalization has no residual");
  if (grad.has_value() && !y.has_value() && of.plain()) {
    auto [grad_x, grad_weight] =
        plain_depthwise_backward({*grad, x, weight, residual_grad, stride, same_padding, want_x, want_weight});
    return {grad_x, grad_weight, empty_tensor({0}, x.scalar_type())};
  }
  auto gradients = with_element(x.scalar_type(), [&](auto element, auto accumulator) {
    return depthwise_backward<decltype(element), decltype(accumulator)>(of, at_output, element);
  });
  if (moments.has_value())
    finish_coefficients(std::get<2>(gradients), map_shape(x, "x").rows(), {*affine, *moments, eps, frozen});
  return gradients;
}

}  // namespace biasloss
