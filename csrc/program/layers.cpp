#include "layers.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../batch_norm/batch_norm_simd.h"
#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "../depthwise/partition.h"
#include "../expand_depthwise/product_simd.h"
#include "../squeeze_excite/squeeze_excite_simd.h"

namespace biasloss {
namespace {

template <class F>
auto with_wide_element(const Tensor& x, const char* name, F&& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
  return f(float());
}

// An image of any strides, and the window of a convolution.
template <class T>
struct Window {
  const T* x;
  int64_t strides[4];
  MapShape in;
  int64_t kernel, stride, padding;

  int64_t size() const { return kernel * kernel * in.channels; }

  // Loads `width` windows of output row `row`, zeros outside of the image: each place of the window, by column, row
  // and channel, as one run of `width` values.
  void load(int64_t sample, int64_t row, int64_t width, T* to) const {
    for (int64_t j = 0; j < kernel; ++j) {
      const int64_t before = std::clamp<int64_t>(divide_up(padding - j, stride), 0, width);
      const int64_t end = std::clamp<int64_t>(divide_up(in.width + padding - j, stride), before, width);
      for (int64_t k = 0; k < kernel; ++k) {
        const int64_t y = row * stride - padding + k;
        const Range inside = y >= 0 && y < in.height ? Range{before, end} : Range{width, width};
        const T* from = x + sample * strides[0] + y * strides[2] + (j - padding) * strides[3];
        for (int64_t c = 0; c < in.channels; ++c, to += width) {
          std::fill_n(to, inside.begin, T(0));
          copy_columns(from + c * strides[1], inside, to);
          std::fill(to + inside.end, to + width, T(0));
        }
      }
    }
  }

 private:
  // The step is a constant where it often is one: such loops are turned into vectors.
  void copy_columns(const T* from, Range columns, T* to) const {
    const int64_t step = stride * strides[3];
    if (step == 1) {
      std::copy(from + columns.begin, from + columns.end, to + columns.begin);
    } else if (step == 2) {
      for (int64_t q = columns.begin; q < columns.end; ++q) to[q] = from[2 * q];
    } else {
      for (int64_t q = columns.begin; q < columns.end; ++q) to[q] = from[step * q];
    }
  }
};

template <class T>
Tensor convolve(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                Activation activation) {
  const int64_t outputs = weight.size(0), kernel = weight.size(2);
  const Window<T> window = {static_cast<const T*>(x.const_data_ptr()),
                            {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
                            {x.size(0), x.size(1), x.size(2), x.size(3)},
                            kernel,
                            stride,
                            padding};
  const MapShape &in = window.in, out = {in.samples, outputs, (in.height + 2 * padding - kernel) / stride + 1,
                                         (in.width + 2 * padding - kernel) / stride + 1};
  STD_TORCH_CHECK(in.height + 2 * padding >= kernel && in.width + 2 * padding >= kernel,
                  "convolution: expected a map of at least ", kernel - 2 * padding, " rows and columns, got ",
                  in.height, " x ", in.width);
  const int64_t row_stride = weight.stride(1);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.stride(0) == 1 &&
                      row_stride >= padded_columns<T>(outputs) && weight.stride(2) == in.channels * row_stride &&
                      weight.stride(3) == kernel * weight.stride(2),
                  "convolution: weight: expected the dtype of x and its values by column, row and channel");
  int64_t bytes = 0;
  STD_TORCH_CHECK(aoti_torch_get_storage_size(weight.get(), &bytes) == 0 &&
                      (weight.storage_offset() + window.size() * row_stride) * int64_t(sizeof(T)) <= bytes,
                  "convolution: weight: expected memory for whole rows");
  // Whole lines of outputs, so that a row can be finished where it lies: no vectors overlap.
  const int64_t padded = padded_columns<T>(outputs);
  const std::vector<T> ones(padded, T(1));
  std::vector<T> shift(padded);
  std::copy_n(values_of<T>(bias, outputs, "convolution: bias"), outputs, shift.data());
  const auto& finish = batch_norm_tables().of(T());
  const auto& product = expansion_tables().of(T());
  Tensor y = empty_map(out, x.scalar_type());
  T* const to = static_cast<T*>(y.mutable_data_ptr());
  const auto* from_weight = static_cast<const T*>(weight.const_data_ptr());
  const int64_t rows = out.samples * out.height, values = window.size() * out.width;
  parallel_shares(rows * values, [&](int64_t share, int64_t shares) {
    T *patches = nullptr, *sums = nullptr;
    Scratch::lay_out([&](Scratch& scratch) {
      patches = scratch.take<T>(values);
      sums = scratch.take<T>(out.width * padded);
      return 0;
    });
    const Range own = part_of(rows, shares, share);
    for (int64_t row = own.begin; row < own.end; ++row) {
      T* const y_row = to + row * out.width * outputs;
      T* const finished = padded == outputs ? y_row : sums;
      Upcoming nothing = {};
      window.load(row / out.height, row % out.height, out.width, patches);
      product.multiply({out.width, outputs, window.size()}, {patches, 1, out.width}, {from_weight, row_stride},
                       {finished, padded}, false, nothing);
      finish.apply({finished, out.width, padded, ones.data(), shift.data(), activation}, nullptr, finished);
      for (int64_t q = 0; padded != outputs && q < out.width; ++q)
        std::copy_n(sums + q * padded, outputs, y_row + q * outputs);
    }
  });
  return y;
}

// The averages over a window of `count` channels from x on, which are a constant where it can be.
template <class T, class Count>
void average_window(const T* x, const MapShape& in, Range rows, Range columns, Count count, T* to) {
  constexpr int64_t kMost = 16;
  T sum[kMost] = {};
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t q = columns.begin; q < columns.end; ++q) {
      const T* from = x + (row * in.width + q) * in.channels;
      for (int64_t c = 0; c < count; ++c) sum[c] += from[c];
    }
  for (int64_t c = 0; c < count; ++c) to[c] = sum[c] / T(rows.size() * columns.size());
}

// A row of the result.
template <class T>
void average_row(const T* x, const MapShape& in, Range rows, int64_t columns, T* to) {
  constexpr std::integral_constant<int64_t, 16> kAtOnce;
  for (int64_t column = 0; column < columns; ++column, to += in.channels) {
    const Range of = {column * in.width / columns, ((column + 1) * in.width + columns - 1) / columns};
    int64_t c = 0;
    for (; c + kAtOnce <= in.channels; c += kAtOnce) average_window(x + c, in, rows, of, kAtOnce, to + c);
    if (c < in.channels) average_window(x + c, in, rows, of, in.channels - c, to + c);
  }
}

}  // namespace

Tensor dense_convolution(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding,
                         Activation activation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == weight.size(3),
                  "convolution: expected x (N, C, H, W) and weight (K, C, k, k)");
  STD_TORCH_CHECK(stride >= 1 && padding >= 0 && padding < weight.size(2),
                  "convolution: expected a stride from 1 on and a padding below ", weight.size(2), ", got ", stride,
                  " and ", padding);
  return with_wide_element(x, "convolution", [&](auto element) {
    return convolve<decltype(element)>(x, weight, bias, stride, padding, activation);
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "linear: expected x (N, C) and weight (K, C)");
  const int64_t samples = x.size(0), depth = x.size(1), outputs = weight.size(0);
  Tensor y = empty_tensor({samples, outputs}, x.scalar_type());
  with_wide_element(x, "linear", [&](auto element) {
    using T = decltype(element);
    const auto& table = squeeze_excite_tables().of(element);
    const T* from = values_of<T>(x, samples * depth, "linear: x");
    const T* of_weight = values_of<T>(weight, outputs * depth, "linear: weight");
    const T* of_bias = values_of<T>(bias, outputs, "linear: bias");
    T* const to = static_cast<T*>(y.mutable_data_ptr());
    constexpr int64_t kStep = 16;  // outputs, of which the weights stay in cache while all samples pass
    const int64_t steps = divide_up(outputs, kStep);
    parallel_shares(outputs * depth, [&](int64_t share, int64_t shares) {
      const Range own = part_of(steps, shares, share);
      for (int64_t step = own.begin; step < own.end; ++step)
        table.linear({from, depth}, samples, of_weight, of_bias, step * kStep, std::min(outputs, (step + 1) * kStep),
                     {to, outputs});
    });
    if (activation != Activation::identity) table.activate(activation, to, samples * outputs, to);
  });
  return y;
}

Tensor average_to(const Tensor& x, const Tensor& like) {
  const MapShape in = map_shape(x, "average: x"), size = map_shape(like, "average: like");
  const MapShape out = {in.samples, in.channels, size.height, size.width};
  if (in.height == out.height && in.width == out.width) return x;
  STD_TORCH_CHECK(in.positions() > 0, "average: expected a map with positions, got ", in.height, " x ", in.width);
  Tensor y = empty_map(out, x.scalar_type());
  with_wide_element(x, "average", [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    parallel_shares(in.rows() * in.channels, [&](int64_t share, int64_t shares) {
      const Range own = part_of(out.samples * out.height, shares, share);
      for (int64_t i = own.begin; i < own.end; ++i) {
        const int64_t row = i % out.height;
        average_row(from + i / out.height * in.positions() * in.channels, in,
                    {row * in.height / out.height, ((row + 1) * in.height + out.height - 1) / out.height}, out.width,
                    to + i * out.width * in.channels);
      }
    });
  });
  return y;
}

}  // namespace biasloss
