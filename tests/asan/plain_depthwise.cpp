// The plain depthwise convolution over one sample whose memory ends where it must, in bands.
#include <initializer_list>
#include <vector>

#include "../../csrc/depthwise/plain_simd.h"
#include "../../csrc/depthwise/window_shift.h"
#include "cases.h"

namespace biasloss {
namespace {

template <class Scalar>
void run_sample(const PlainKernels<Scalar>& kernels, int64_t lanes, int64_t channels, int64_t size, int64_t kernel,
                int64_t stride, bool same_padding) {
  const int64_t height = size, width = size + 1, distance = channels + 1;
  const int64_t out_height = (height + stride - 1) / stride, out_width = (width + stride - 1) / stride;
  const int64_t taps = vectors_of(channels, lanes) * kernel * kernel * lanes, which = (kernel - 3) / 2;
  // Columns are `channels` + 1 values apart, but for the last: it ends with its last channel.
  std::vector<Scalar> x(height * width * distance - 1), grad_x(x.size()), y(out_height * out_width * distance - 1);
  std::vector<Scalar> weight(taps, Scalar(1)), grad_weight(taps);
  const NextBand next = {{{reinterpret_cast<const char*>(x.data()), reinterpret_cast<const char*>(x.data() + x.size())},
                          {nullptr, nullptr},
                          {nullptr, nullptr}}};
  Band band = {height,
               width,
               out_height,
               out_width,
               channels,
               distance,
               window_shift(height, stride, same_padding),
               window_shift(width, stride, same_padding),
               0,
               0};
  for (; band.begin < out_height; band.begin = band.end) {
    band.end = band.begin + 3 < out_height ? band.begin + 3 : out_height;
    kernels.convolve[which][stride - 1](x.data(), weight.data(), band, y.data(), next);
  }
  for (band.begin = 0; band.begin < height; band.begin = band.end) {
    band.end = band.begin + 3 < height ? band.begin + 3 : height;
    const auto run = [&](Scalar* to_x, Scalar* to_weight) {
      kernels.gradients[which][stride - 1]({y.data(), x.data(), to_x, to_weight}, weight.data(), band, next);
    };
    run(grad_x.data(), grad_weight.data());
    run(grad_x.data(), nullptr);
    run(nullptr, grad_weight.data());
  }
}

}  // namespace

void run_plain_depthwise() {
  const PlainTables& tables = baseline::plain_tables;
  const int64_t lanes = baseline::depthwise_tables.float32.lanes, wide = baseline::depthwise_tables.float64.lanes;
  for (const int64_t size : {1, 2, 7, 15, 30})
    for (const int64_t kernel : {3, 5, 7})
      for (const int64_t stride : {1, 2}) {
        for (const int64_t channels : {lanes, 2 * lanes, 2 * lanes + 1})
          for (const bool same_padding : {false, stride == 2})
            run_sample(tables.float32, lanes, channels, size, kernel, stride, same_padding);
        for (const int64_t channels : {wide, wide + 1})
          run_sample(tables.float64, wide, channels, size, kernel, stride, channels == wide);
      }
}

}  // namespace biasloss
