#include "layers.h"

#include <algorithm>
#include <vector>

#include "../cpu/parallel.h"
#include "../depthwise/partition.h"
#include "../simd/isa.h"
#include "tensors.h"

namespace biasloss {

namespace avx2 {
extern const QuantizedTable quantized_table;
}
namespace avx512vnni {
extern const QuantizedTable quantized_table;
}

const QuantizedTable& quantized_table() {
  switch (best_int8_isa()) {
#if defined(BIASLOSS_WITH_INT8_AVX512VNNI)
    case Int8Isa::avx512vnni:
      return avx512vnni::quantized_table;
#endif
#if defined(BIASLOSS_WITH_INT8_AVX2)
    case Int8Isa::avx2:
      return avx2::quantized_table;
#endif
    default:
      STD_TORCH_CHECK(false, "int8 needs a CPU with AVX2 and kernels built for it; this process has ",
                      isa_name(best_isa()), " kernels in float32 and float64");
  }
}

Tensor quantize(const Tensor& x, const Tensor& levels) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "quantize: x: expected float32");
  STD_TORCH_CHECK(x.dim() == 4 || (x.dim() == 2 && x.is_contiguous()),
                  "quantize: x: expected a map (N, C, H, W), or a contiguous matrix");
  const bool is_map = x.dim() == 4;
  const MapShape s = {x.size(0), x.size(1), is_map ? x.size(2) : 1, is_map ? x.size(3) : 1};
  Tensor y = empty_like_map(x, s, ScalarType::Byte);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  uint8_t* const to = static_cast<uint8_t*>(y.mutable_data_ptr());
  const Levels of = levels_of(levels);
  const auto& table = quantized_table();
  const bool rows_are_dense = !is_map || (x.stride(1) == 1 && x.stride(3) == s.channels);
  const int64_t values = s.width * s.channels;
  parallel_shares(s.rows() * s.channels, [&](int64_t share, int64_t shares) {
    const Range own = part_of(s.samples * s.height, shares, share);
    std::vector<uint8_t> plane(rows_are_dense ? 0 : s.width);
    std::vector<float> line(rows_are_dense ? 0 : s.width);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const float* row = from + i / s.height * x.stride(0) + (is_map ? i % s.height * x.stride(2) : 0);
      if (rows_are_dense) {
        table.quantize(row, values, of, to + i * values);
        continue;
      }
      for (int64_t c = 0; c < s.channels; ++c) {
        const float* of_plane = row + c * x.stride(1);
        if (x.stride(3) != 1) {
          for (int64_t q = 0; q < s.width; ++q) line[q] = of_plane[q * x.stride(3)];
          of_plane = line.data();
        }
        table.quantize(of_plane, s.width, of, plane.data());
        for (int64_t q = 0; q < s.width; ++q) to[i * values + q * s.channels + c] = plane[q];
      }
    }
  });
  return y;
}

Tensor dequantize(const Tensor& x, const Tensor& levels) {
  const MapShape s = bytes_shape(x, "dequantize: x");
  const Levels of = levels_of(levels);
  Tensor y = empty_like_map(x, s, ScalarType::Float);
  float* const to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t count = s.rows() * s.channels;
  parallel_shares(count, [&](int64_t share, int64_t shares) {
    const Range own = part_of(count, shares, share);
    quantized_table().dequantize(bytes_of(x) + own.begin, own.size(), of, to + own.begin);
  });
  return y;
}

Tensor quantized_pool(const Tensor& x, const Tensor& levels) {
  constexpr int64_t kChannels = 64;  // a cache line
  const MapShape s = bytes_shape(x, "quantized pool: x");
  STD_TORCH_CHECK(s.positions() >= 1 && s.positions() <= 1 << 23, "quantized pool: expected 1 to 2^23 positions, got ",
                  s.positions());
  const Levels of = levels_of(levels);
  Tensor y = empty_tensor({s.samples, s.channels}, ScalarType::Float);
  float* const to = static_cast<float*>(y.mutable_data_ptr());
  const float factor = of.step / float(s.positions());
  const int64_t blocks = divide_up(s.channels, kChannels);
  parallel_shares(s.rows() * s.channels, [&](int64_t share, int64_t shares) {
    const Range own = part_of(s.samples * blocks, shares, share);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t sample = i / blocks, channel = i % blocks * kChannels;
      const int64_t count = std::min(kChannels, s.channels - channel);
      int32_t sums[kChannels] = {};
      quantized_table().add_up(bytes_of(x) + sample * s.positions() * s.channels + channel, s.positions(), s.channels,
                               count, sums);
      for (int64_t c = 0; c < count; ++c)
        to[sample * s.channels + channel + c] = float(sums[c] - int32_t(s.positions()) * of.zero) * factor;
    }
  });
  return y;
}

Tensor quantized_average(const Tensor& x, const Tensor& like) {
  const MapShape in = bytes_shape(x, "quantized average: x"), size = bytes_shape(like, "quantized average: like");
  STD_TORCH_CHECK(in.samples == size.samples && in.positions() > 0,
                  "quantized average: expected maps of as many samples, and one that is not empty");
  const MapShape out = {in.samples, in.channels, size.height, size.width};
  Tensor y = empty_map(out, ScalarType::Byte);
  uint8_t* const to = static_cast<uint8_t*>(y.mutable_data_ptr());
  const auto& table = quantized_table();
  const auto window = [](int64_t i, int64_t whole, int64_t parts) {
    return Range{i * whole / parts, ((i + 1) * whole + parts - 1) / parts};
  };
  parallel_shares(in.rows() * in.channels, [&](int64_t share, int64_t shares) {
    const Range own = part_of(out.rows(), shares, share);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t sample = i / out.positions();
      const Range rows = window(i / out.width % out.height, in.height, out.height);
      const Range columns = window(i % out.width, in.width, out.width);
      const uint8_t* from = bytes_of(x) + ((sample * in.height + rows.begin) * in.width + columns.begin) * in.channels;
      table.average(from, rows.size(), in.width * in.channels, columns.size(), in.channels, to + i * in.channels);
    }
  });
  return y;
}

Tensor quantized_gate(const Tensor& x, const Tensor& gate, const Tensor& x_levels, const Tensor& y_levels) {
  const MapShape s = bytes_shape(x, "quantized gate: x");
  const float* factors = checked_values<float>(gate, ScalarType::Float, s.samples * s.channels, "quantized gate: gate");
  const Levels from = levels_of(x_levels), of_y = levels_of(y_levels);
  Tensor y = empty_like_map(x, s, ScalarType::Byte);
  uint8_t* const to = static_cast<uint8_t*>(y.mutable_data_ptr());
  parallel_shares(s.rows() * s.channels, [&](int64_t share, int64_t shares) {
    const Range own = part_of(s.rows(), shares, share);
    for (int64_t row = own.begin; row < own.end;) {
      const int64_t sample = row / s.positions(), end = std::min(own.end, (sample + 1) * s.positions());
      quantized_table().gate(bytes_of(x) + row * s.channels, end - row, s.channels, factors + sample * s.channels, from,
                             of_y, to + row * s.channels);
      row = end;
    }
  });
  return y;
}

}  // namespace biasloss
