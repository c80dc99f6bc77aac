#include <algorithm>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "../depthwise/partition.h"
#include "layers.h"
#include "tensors.h"

namespace biasloss {
namespace {

struct Checked {
  const int8_t* weight;
  const int32_t* bias;
  Levels x;
  Finish finish;
  Target to;  // of the first row
};

int64_t result_size(int64_t size, int64_t before, int64_t after, const QuantizedConvolution& of) {
  STD_TORCH_CHECK(size + before + after >= of.kernel, "quantized convolution: expected a map of at least ",
                  of.kernel - before - after, " rows and columns, got ", size);
  return (size + before + after - of.kernel) / of.stride + 1;
}

// Of a result that is yet to be computed, in `y`.
Checked checked(const QuantizedConvolution& of, int64_t weights, const MapShape& out, const Tensor& y) {
  const int64_t padded = padded_to(of.outputs, kOutputs);
  Checked c;
  c.weight = checked_values<int8_t>(of.weight, ScalarType::Char, weights, "quantized convolution: weight");
  c.bias = checked_values<int32_t>(of.bias, ScalarType::Int, padded, "quantized convolution: bias");
  const float* scale = checked_values<float>(of.scale, ScalarType::Float, padded, "quantized convolution: scale");
  const bool to_bytes = of.y_levels.numel() > 0;
  c.x = levels_of(of.x_levels);
  c.finish = {scale, of.activation, to_bytes ? levels_of(of.y_levels) : Levels{1, 0}, {1, 0}};
  c.to = {nullptr, nullptr, nullptr, of.outputs};
  if (to_bytes)
    c.to.bytes = static_cast<uint8_t*>(y.mutable_data_ptr());
  else
    c.to.floats = static_cast<float*>(y.mutable_data_ptr());
  if (of.residual.has_value()) {
    const MapShape s = bytes_shape(*of.residual, "quantized convolution: residual");
    STD_TORCH_CHECK(s.samples == out.samples && s.channels == out.channels && s.height == out.height &&
                        s.width == out.width && of.residual_levels.has_value(),
                    "quantized convolution: residual: expected the shape of the result, and its levels");
    c.to.residual = bytes_of(*of.residual);
    c.finish.residual_levels = levels_of(*of.residual_levels);
  }
  return c;
}

Target moved(Target to, int64_t values) {
  if (to.bytes != nullptr) to.bytes += values;
  if (to.floats != nullptr) to.floats += values;
  if (to.residual != nullptr) to.residual += values;
  return to;
}

ScalarType result_dtype(const QuantizedConvolution& of) {
  return of.y_levels.numel() > 0 ? ScalarType::Byte : ScalarType::Float;
}

// The windows that a dense convolution reads, each as a row of kernel x kernel x channels bytes, filled up with zeros.
struct Windows {
  static constexpr int64_t kCopied = 16;

  const uint8_t* x;
  MapShape in, out;
  int64_t kernel, stride, padding, depth;
  uint8_t zero;

  // Behind the last row may lie kCopied bytes that are overwritten.
  void load(int64_t first, int64_t rows, uint8_t* to) const {
    int64_t q = first % out.width, p = first / out.width % out.height;
    const uint8_t* sample = x + first / out.positions() * in.positions() * in.channels;
    const uint8_t* const end = x + in.rows() * in.channels;
    for (int64_t row = 0; row < rows; ++row, to += depth) {
      const int64_t top = p * stride - padding, left = q * stride - padding;
      const uint8_t* from = sample + (top * in.width + left) * in.channels;
      const bool inside = top >= 0 && top + kernel <= in.height && left >= 0 && left + kernel <= in.width;
      if (inside && kernel * in.channels <= kCopied && from + (kernel - 1) * in.width * in.channels + kCopied <= end)
        load_short(from, to);
      else
        load_any(sample, top, left, to);
      if (++q < out.width) continue;
      q = 0;
      if (++p < out.height) continue;
      p = 0;
      sample += in.positions() * in.channels;
    }
  }

  // Rows of few bytes in copies of a constant length, each of which overwrites what the one before it had too much.
  void load_short(const uint8_t* from, uint8_t* to) const {
    for (int64_t k = 0; k < kernel; ++k)
      std::copy_n(from + k * in.width * in.channels, kCopied, to + k * kernel * in.channels);
    for (int64_t k = kernel * kernel * in.channels; k < depth; ++k) to[k] = 0;
  }

  void load_any(const uint8_t* sample, int64_t top, int64_t left, uint8_t* to) const {
    const int64_t begin = std::max<int64_t>(0, -left), end = std::clamp<int64_t>(in.width - left, begin, kernel);
    const int64_t c = in.channels;
    for (int64_t k = 0; k < kernel; ++k, to += kernel * c) {
      const int64_t y = top + k;
      if (y < 0 || y >= in.height) {
        std::fill_n(to, kernel * c, zero);
        continue;
      }
      std::fill_n(to, begin * c, zero);
      std::copy_n(sample + (y * in.width + left + begin) * c, (end - begin) * c, to + begin * c);
      std::fill_n(to + end * c, (kernel - end) * c, zero);
    }
    std::fill_n(to, depth - kernel * kernel * c, uint8_t(0));
  }
};

// What of the work is one piece: few rows are cut by outputs, which leaves all of the weights to nobody.
struct Pieces {
  static constexpr int64_t kFewRows = 8 * kTileRows;

  Pieces(int64_t rows, int64_t outputs)
      : tiles(divide_up(rows, kTileRows)), panels(rows < kFewRows ? divide_up(outputs, kPanel) : 1) {}
  int64_t count() const { return tiles * panels; }

  int64_t tiles, panels;
};

}  // namespace

Tensor quantized_convolution(const Tensor& x, const QuantizedConvolution& of) {
  const MapShape in = bytes_shape(x, "quantized convolution: x");
  STD_TORCH_CHECK(
      of.outputs >= 1 && of.kernel >= 1 && of.stride >= 1 && of.padding >= 0 && of.padding < of.kernel,
      "quantized convolution: expected outputs, kernel and stride from 1 on, and a padding below the kernel");
  const MapShape out = {in.samples, of.outputs, result_size(in.height, of.padding, of.padding, of),
                        result_size(in.width, of.padding, of.padding, of)};
  const int64_t depth = padded_to(of.kernel * of.kernel * in.channels, kDotDepth);
  Tensor y = empty_like_map(x, out, result_dtype(of));
  const Checked c = checked(of, padded_to(of.outputs, kOutputs) * depth, out, y);
  const bool reads_windows = of.kernel != 1 || of.stride != 1 || depth != in.channels;
  const Windows windows = {bytes_of(x), in, out, of.kernel, of.stride, of.padding, depth, uint8_t(c.x.zero)};
  const auto& table = quantized_table();
  const Pieces pieces(out.rows(), of.outputs);
  // As many elements as take the time that others take for one of float32.
  parallel_shares(out.rows() * of.outputs * (1 + depth / 64), [&](int64_t share, int64_t shares) {
    int32_t* sums = nullptr;
    uint8_t* patches = nullptr;
    Scratch::lay_out([&](Scratch& scratch) {
      sums = scratch.take<int32_t>(kTileRows * kPanel);
      patches = scratch.take<uint8_t>(reads_windows ? kTileRows * depth + Windows::kCopied : 0);
      return 0;
    });
    const Range own = part_of(pieces.count(), shares, share);
    for (int64_t piece = own.begin; piece < own.end; ++piece) {
      const int64_t first = piece % pieces.tiles * kTileRows, rows = std::min(kTileRows, out.rows() - first);
      const int64_t panel = piece / pieces.tiles;
      const int64_t begin = pieces.panels == 1 ? 0 : panel * kPanel;
      const int64_t end = pieces.panels == 1 ? of.outputs : std::min(of.outputs, begin + kPanel);
      const uint8_t* a = bytes_of(x) + first * depth;
      if (reads_windows) {
        windows.load(first, rows, patches);
        a = patches;
      }
      for (int64_t output = begin; output < end; output += kPanel) {
        const int64_t outputs = std::min(kPanel, end - output);
        table.multiply(a, depth, rows, c.weight + output * depth, depth, padded_to(outputs, kOutputs), c.bias + output,
                       sums);
        Finish finish = c.finish;
        finish.scale += output;
        table.finish(finish, sums, kPanel, rows, outputs, moved(c.to, first * of.outputs + output));
      }
    }
  });
  return y;
}

namespace {

// Rows of a depthwise convolution: a piece is some rows of some blocks of 16 channels of a sample, whose rows of input
// lie in a ring, interleaved.
struct Strips {
  static constexpr int64_t kRingBytes = 32768, kPieces = 16, kFewestRows = 4;

  Strips(const MapShape& in, const MapShape& out, int64_t kernel, int64_t groups_of_row)
      : row_bytes(groups_of_row * BLOCK), blocks(divide_up(in.channels, kOutputs)), height(out.height) {
    const int64_t fitting = std::max<int64_t>(1, kRingBytes / (kernel * row_bytes));
    blocks_of_piece = std::min({blocks, fitting, std::max<int64_t>(4, divide_up(blocks, 4))});
    chunks = divide_up(blocks, blocks_of_piece);
    const int64_t most = std::max<int64_t>(1, height / kFewestRows);
    strips = std::clamp<int64_t>(kPieces / (chunks * in.samples), 1, most);
  }
  int64_t count(const MapShape& in) const { return in.samples * strips * chunks; }

  static constexpr int64_t BLOCK = kOutputs * kColumnGroup;
  int64_t row_bytes, blocks, height, blocks_of_piece, chunks, strips;
};

struct Depthwise {
  const uint8_t* x;
  MapShape in, out;
  const QuantizedConvolution& of;
  const Checked& c;
  int64_t top, left, groups, phases, reach;

  int64_t weights_of_block() const { return of.kernel * phases * reach * Strips::BLOCK; }

  void run(const Strips& strips, int64_t piece, uint8_t* ring, int32_t* sums) const {
    const auto& table = quantized_table();
    const auto row_kernel = table.depthwise(of.kernel, of.stride);
    const int64_t chunk = piece % strips.chunks, strip = piece / strips.chunks % strips.strips;
    const int64_t sample = piece / strips.chunks / strips.strips;
    const Range rows = part_of(out.height, strips.strips, strip);
    const int64_t first_block = chunk * strips.blocks_of_piece;
    const int64_t count = std::min(strips.blocks_of_piece, strips.blocks - first_block);
    const auto ring_row = [&](int64_t y) {
      return ring + (y + of.kernel) % of.kernel * strips.blocks_of_piece * strips.row_bytes;
    };
    int64_t loaded = rows.begin * of.stride - top;  // the first row of x that is not in the ring
    std::vector<const uint8_t*> window(of.kernel);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t first = row * of.stride - top;
      for (loaded = std::max(loaded, first); loaded < first + of.kernel; ++loaded)
        for (int64_t b = 0; b < count; ++b)
          load(sample, loaded, first_block + b, ring_row(loaded) + b * strips.row_bytes);
      for (int64_t b = 0; b < count; ++b) {
        const int64_t block = first_block + b, channel = block * kOutputs;
        for (int64_t k = 0; k < of.kernel; ++k) window[k] = ring_row(first + k) + b * strips.row_bytes;
        row_kernel(window.data(), groups, c.weight + block * weights_of_block(), c.bias + channel, sums);
        Finish finish = c.finish;
        finish.scale += channel;
        const int64_t at = ((sample * out.height + row) * out.width) * out.channels + channel;
        table.finish(finish, sums, kOutputs, out.width, std::min(kOutputs, out.channels - channel), moved(c.to, at));
      }
    }
  }

  void load(int64_t sample, int64_t y, int64_t block, uint8_t* to) const {
    const int64_t channel = block * kOutputs;
    const bool inside = y >= 0 && y < in.height;
    const uint8_t* from = inside ? x + ((sample * in.height + y) * in.width) * in.channels + channel : nullptr;
    quantized_table().interleave(from, in.channels, std::min(kOutputs, in.channels - channel), in.width, left,
                                 groups + reach - 1, uint8_t(c.x.zero), to);
  }
};

}  // namespace

Tensor quantized_depthwise(const Tensor& x, const QuantizedConvolution& of) {
  const MapShape in = bytes_shape(x, "quantized depthwise: x");
  STD_TORCH_CHECK(quantized_table().depthwise(of.kernel, of.stride) != nullptr,
                  "quantized depthwise: expected a kernel of 3, 5 or 7 and a stride of 1 or 2, got ", of.kernel,
                  " and ", of.stride);
  STD_TORCH_CHECK(of.outputs == in.channels, "quantized depthwise: expected ", of.outputs, " channels, got ",
                  in.channels);
  const int64_t half = of.kernel / 2;
  const auto before = [&](int64_t size) { return of.same_padding && of.stride > 1 ? half - 1 + size % 2 : half; };
  const MapShape out = {in.samples, in.channels, result_size(in.height, before(in.height), half, of),
                        result_size(in.width, before(in.width), half, of)};
  Tensor y = empty_like_map(x, out, result_dtype(of));
  const int64_t phases = kColumnGroup / of.stride, groups = divide_up(out.width, phases);
  const int64_t reach = groups_of_window(of.kernel, of.stride);
  const int64_t weights = divide_up(in.channels, kOutputs) * of.kernel * phases * reach * Strips::BLOCK;
  const Checked c = checked(of, weights, out, y);
  const Strips strips(in, out, of.kernel, groups + reach - 1);
  const Depthwise depthwise = {bytes_of(x), in, out, of, c, before(in.height), before(in.width), groups, phases, reach};
  parallel_shares(out.rows() * in.channels, [&](int64_t share, int64_t shares) {
    uint8_t* ring = nullptr;
    int32_t* sums = nullptr;
    Scratch::lay_out([&](Scratch& scratch) {
      ring = scratch.take<uint8_t>(of.kernel * strips.blocks_of_piece * strips.row_bytes);
      sums = scratch.take<int32_t>(groups * phases * kOutputs);
      return 0;
    });
    const Range own = part_of(strips.count(in), shares, share);
    for (int64_t piece = own.begin; piece < own.end; ++piece) depthwise.run(strips, piece, ring, sums);
  });
  return y;
}

}  // namespace biasloss
