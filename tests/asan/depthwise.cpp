// The row kernels of the depthwise convolution over small rows whose memory ends where it must: a read or write past it
// stops the program. Values are checked elsewhere.
#include <initializer_list>
#include <vector>

#include "../../csrc/depthwise/rows_simd.h"
#include "../../csrc/depthwise/window_shift.h"
#include "../../csrc/expand_depthwise/activated_simd.h"
#include "cases.h"

namespace biasloss {
namespace {

template <class T, class Scalar>
void run_rows(const DepthwiseKernels<T, Scalar>& kernels, const ActivatedKernels<T, Scalar>& activated,
              int64_t channels, int64_t width, int64_t kernel, int64_t stride, int64_t shift, int activation) {
  const int64_t lanes = kernels.lanes, vectors = vectors_of(channels, lanes), taps_count = kernel * kernel;
  const int64_t out_width = (width + stride - 1) / stride;
  const int64_t columns = strip_columns(width, kernel), dy_columns = strip_columns(width, kernel);
  // The rows of a map are `channels` + 1 values apart, but for the last: it ends with its last channel.
  const int64_t distance = channels + 1;
  std::vector<T> x((width - 1) * distance + channels, T{}), grad_x = x;
  std::vector<T> y((out_width - 1) * distance + channels, T{});
  std::vector<Scalar> row(channels, Scalar(1)), weight(channels * taps_count, Scalar(1));
  std::vector<Scalar> packed(vectors * taps_count * lanes), strip(vectors * columns * lanes),
      of_dy(vectors * dy_columns * lanes), grad_weight(packed.size()), moments(vectors * 3 * lanes),
      sums(vectors * 2 * lanes), workspace(strip_columns(width + shift, kernel) * lanes);
  const int64_t padding = kernel / 2 * lanes;
  const Strip<Scalar> h = {strip.data() + padding, columns}, dy = {of_dy.data() + padding, dy_columns};
  const Affine<Scalar> affine = {row.data(), row.data(), activation};
  const RowSize in_row = {width, channels}, out_row = {out_width, channels};

  kernels.pack(weight.data(), 1, channels, channels, taps_count, packed.data());
  kernels.pack(weight.data(), taps_count, 1, channels, taps_count, packed.data());
  kernels.activate({x.data(), distance}, in_row, affine, h);
  kernels.activate({x.data(), distance}, in_row, {}, h);
  OutputGradient<T, Scalar> at_output = {};
  at_output.grad = {y.data(), distance};
  kernels.output_gradient(at_output, out_row, dy);
  at_output.y = {y.data(), distance};
  at_output.pool_grad = row.data();
  at_output.affine = affine;
  for (auto& coefficient : at_output.coefficients) coefficient = row.data();
  kernels.output_gradient(at_output, out_row, dy);

  Taps<Scalar> of_h = {}, of_gradient = {};
  for (int64_t i = 0; i < kernel; ++i) of_h.add({h.data + shift * lanes, columns}, i);
  for (int64_t i = 0; i < kernel; ++i) of_gradient.add({dy.data - shift * lanes, dy_columns}, i);
  const int64_t size = (kernel - 3) / 2;
  for (Scalar* wanted : {moments.data(), static_cast<Scalar*>(nullptr)})
    kernels.convolve[size][stride - 1](of_h, packed.data(), out_row, {y.data(), distance}, {wanted, 0});
  for (Scalar* wanted : {row.data(), static_cast<Scalar*>(nullptr)})
    activated.convolve[size][stride - 1](of_h, packed.data(), out_row, {{y.data(), distance}, affine, wanted});
  kernels.weight_gradient[size][stride - 1](dy, of_h, out_row, grad_weight.data());
  for (const T* residual : {x.data(), static_cast<T*>(nullptr)}) {
    const InputGradient<T, Scalar> to = {{x.data(), distance}, {grad_x.data(), distance}, affine, row.data(),
                                         sums.data(),          {residual, distance},      shift};
    kernels.input_gradient[size][stride - 1](of_gradient, packed.data(), in_row, to, workspace.data());
  }
  kernels.unpack(grad_weight.data(), channels, taps_count, weight.data(), taps_count, 1);
}

}  // namespace

void run_depthwise() {
  const DepthwiseTables& tables = baseline::depthwise_tables;
  const ActivatedTables& activated = baseline::activated_tables;
  int activation = 0;
  for (const int64_t channels : {1, 3, 4, 5, 8, 9, 17, 24})
    for (const int64_t width : {1, 2, 7, 8, 13, 15})
      for (const int64_t kernel : {3, 5, 7})
        for (const int64_t stride : {1, 2}) {
          const int64_t shift = window_shift(width, stride, channels % 2 == 1);
          activation = (activation + 1) % 5;
          run_rows(tables.float32, activated.float32, channels, width, kernel, stride, shift, activation);
          run_rows(tables.float64, activated.float64, channels, width, kernel, stride, shift, activation);
          run_rows(tables.float16, activated.float16, channels, width, kernel, stride, shift, activation);
          run_rows(tables.bfloat16, activated.bfloat16, channels, width, kernel, stride, shift, activation);
        }
}

}  // namespace biasloss
