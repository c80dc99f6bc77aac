// The kernels on bytes over rows whose memory ends where it must; on CPUs that have their instructions.
#include <initializer_list>
#include <vector>

#include "../../csrc/quantized/kernels.h"
#include "cases.h"

#if defined(__x86_64__)
namespace biasloss {
namespace avx2 {
extern const QuantizedTable quantized_table;
}
namespace avx512vnni {
extern const QuantizedTable quantized_table;
}
namespace {

constexpr Levels kLevels = {0.5f, 3};

int64_t whole_vectors(int64_t count) { return (count + kOutputs - 1) / kOutputs * kOutputs; }

void run_product(const QuantizedTable& table, int64_t rows, int64_t outputs, int64_t depth, Activation activation) {
  const int64_t padded = whole_vectors(outputs);
  const std::vector<uint8_t> a(rows * depth, 200), residual(rows * outputs, 7);
  const std::vector<int8_t> b(padded * depth, -127);
  const std::vector<int32_t> bias(padded, 5);
  const std::vector<float> scale(padded, 0.001f);
  std::vector<int32_t> sums((rows - 1) * kPanel + padded);
  table.multiply(a.data(), depth, rows, b.data(), depth, padded, bias.data(), sums.data());
  std::vector<uint8_t> bytes(rows * outputs);
  std::vector<float> floats(rows * outputs);
  const Finish finish = {scale.data(), activation, kLevels, kLevels};
  for (const uint8_t* other : {static_cast<const uint8_t*>(nullptr), residual.data()}) {
    table.finish(finish, sums.data(), kPanel, rows, outputs, {bytes.data(), nullptr, other, outputs});
    table.finish(finish, sums.data(), kPanel, rows, outputs, {nullptr, floats.data(), other, outputs});
  }
}

void run_depthwise_rows(const QuantizedTable& table, int64_t kernel, int64_t stride, int64_t channels, int64_t width) {
  const int64_t phases = kColumnGroup / stride, groups = (width + phases - 1) / phases;
  const int64_t reach = groups_of_window(kernel, stride), groups_of_row = groups + reach - 1;
  const std::vector<uint8_t> x((width - 1) * (channels + 5) + channels, 9);
  std::vector<uint8_t> row(groups_of_row * kColumnGroup * kOutputs);
  table.interleave(x.data(), channels + 5, channels, width, kernel / 2, groups_of_row, 3, row.data());
  table.interleave(nullptr, channels + 5, channels, width, kernel / 2, groups_of_row, 3, row.data());
  const std::vector<const uint8_t*> rows(kernel, row.data());
  const std::vector<int8_t> weights(kernel * phases * reach * kColumnGroup * kOutputs, 3);
  const std::vector<int32_t> bias(kOutputs);
  std::vector<int32_t> sums(groups * phases * kOutputs);
  table.depthwise(kernel, stride)(rows.data(), groups, weights.data(), bias.data(), sums.data());
}

void run_maps(const QuantizedTable& table, int64_t channels) {
  constexpr int64_t rows = 3, columns = 2;
  const std::vector<float> x(rows * channels, 0.25f), gate(channels, 0.5f);
  std::vector<uint8_t> bytes(rows * channels), other(rows * channels);
  std::vector<float> back(rows * channels);
  std::vector<int32_t> sums(channels);
  table.quantize(x.data(), rows * channels, kLevels, bytes.data());
  table.dequantize(bytes.data(), rows * channels, kLevels, back.data());
  table.gate(bytes.data(), rows, channels, gate.data(), kLevels, kLevels, other.data());
  table.add_up(bytes.data(), rows, channels, channels, sums.data());
  table.average(bytes.data(), rows - 1, channels, columns, channels, other.data());
}

void run_table(const QuantizedTable& table) {
  for (const int64_t rows : {1, 5, 6, 13, 24})
    for (const int64_t outputs : {1, 16, 24, 40, 64})
      run_product(table, rows, outputs, 4 * (rows % 3 + 1), Activation(rows % 9));
  for (const int64_t kernel : {3, 5, 7})
    for (const int64_t stride : {1, 2})
      for (const int64_t width : {1, 4, 7})
        for (const int64_t channels : {1, 5, 8, 11, 16}) run_depthwise_rows(table, kernel, stride, channels, width);
  for (const int64_t channels : {1, 16, 23, 64, 75}) run_maps(table, channels);
}

}  // namespace

void run_quantized() {
  if (__builtin_cpu_supports("avx2")) run_table(avx2::quantized_table);
  if (__builtin_cpu_supports("avx512vnni")) run_table(avx512vnni::quantized_table);
}

}  // namespace biasloss
#else
void biasloss::run_quantized() {}
#endif
