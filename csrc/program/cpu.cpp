#include <chrono>
#include <optional>
#include <utility>

#include "../batch_norm/ops.h"
#include "../cpu/activation.h"
#include "../cpu/maps.h"
#include "../cpu/team.h"
#include "../depthwise/ops.h"
#include "../expand_depthwise/ops.h"
#include "../pointwise/ops.h"
#include "../pool_variance/ops.h"
#include "../quantized/layers.h"
#include "../squeeze_excite/ops.h"
#include "layers.h"
#include "ops.h"

namespace biasloss {
namespace {

enum class Operation : int64_t {
  expand_depthwise,
  depthwise,
  pointwise,
  pool,
  squeeze_excite,
  normalize,
  convolution,
  linear,
  average,
  release,
  quantize,
  dequantize,
  quantized_convolution,
  quantized_depthwise,
  quantized_pool,
  quantized_average,
  quantized_gate,
  count
};

// A row of the code: see Instruction in biasloss_ext/ops/program/code.py.
struct Instruction {
  int64_t operation, output, pooled, input, other, gate, constants, on_load, activation, output_activation, stride,
      same_padding, padding, kernel, outputs;
};
constexpr size_t kFields = sizeof(Instruction) / sizeof(int64_t);

// Where a program on this thread adds up the nanoseconds of its instructions, if anyone asked.
thread_local int64_t* nanoseconds_of_rows = nullptr;

class Clock {
 public:
  // Of what ran since the call before.
  void count(size_t row) {
    if (nanoseconds_of_rows == nullptr) return;
    const auto now = std::chrono::steady_clock::now();
    nanoseconds_of_rows[row] += std::chrono::nanoseconds(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Runs instructions on values, which are numbered; value 0 is the input.
class Machine {
 public:
  Machine(Tensor x, const std::vector<Tensor>& constants) : constants_(constants), values_(1) {
    values_[0] = std::move(x);
  }

  Tensor run(const std::vector<int64_t>& code) {
    STD_TORCH_CHECK(!code.empty() && code.size() % kFields == 0, "program: code: expected rows of ", kFields,
                    " integers, got ", code.size(), " integers");
    int64_t last = 0;
    Clock clock;
    for (size_t at = 0; at < code.size(); at += kFields) {
      Instruction i;
      std::copy_n(code.data() + at, kFields, reinterpret_cast<int64_t*>(&i));
      run(i);
      clock.count(at / kFields);
      if (static_cast<Operation>(i.operation) != Operation::release) last = i.output;
    }
    return std::move(value(last));
  }

 private:
  Tensor& value(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number < int64_t(values_.size()) && values_[number].has_value(), "program: value ",
                    number, " is read before it is computed");
    return *values_[number];
  }

  OptionalTensor optional_value(int64_t number) { return number < 0 ? OptionalTensor() : value(number); }

  const Tensor& constant(const Instruction& i, int64_t index) const {
    const int64_t at = i.constants + index;
    STD_TORCH_CHECK(at >= 0 && at < int64_t(constants_.size()), "program: constant ", at, " of ", constants_.size());
    return constants_[at];
  }

  OptionalTensor affine_on_load(const Instruction& i, int64_t index) const {
    return i.on_load ? OptionalTensor(constant(i, index)) : OptionalTensor();
  }

  QuantizedConvolution quantized(const Instruction& i) {
    return {constant(i, 0),
            constant(i, 1),
            constant(i, 2),
            constant(i, 3),
            constant(i, 4),
            optional_value(i.other),
            i.other < 0 ? OptionalTensor() : OptionalTensor(constant(i, 5)),
            i.outputs,
            i.kernel,
            i.stride,
            i.padding,
            i.same_padding != 0,
            checked_activation(i.output_activation, "output_activation")};
  }

  void set(int64_t number, Tensor result) {
    constexpr int64_t kMostValues = 1 << 20;
    STD_TORCH_CHECK(number >= 0 && number < kMostValues, "program: output: expected the number of a value, got ",
                    number);
    if (number >= int64_t(values_.size())) values_.resize(number + 1);
    values_[number] = std::move(result);
  }

  void run(const Instruction& i) {
    switch (static_cast<Operation>(i.operation)) {
      case Operation::expand_depthwise: {
        auto [h, pooled] = expand_depthwise_activate_cpu(value(i.input), constant(i, 0), constant(i, 1), constant(i, 2),
                                                         constant(i, 3), i.activation, i.stride, i.same_padding,
                                                         i.output_activation, i.pooled >= 0);
        set(i.output, std::move(h));
        if (i.pooled >= 0) set(i.pooled, std::move(pooled));
        return;
      }
      case Operation::depthwise:
        return set(i.output,
                   std::get<0>(depthwise_cpu(value(i.input), constant(i, 0), affine_on_load(i, 1), i.activation,
                                             i.stride, i.same_padding, false, {}, {}, {}, {}, {}, 0, 0)));
      case Operation::pointwise:
        return set(i.output,
                   std::get<0>(pointwise_cpu(value(i.input), constant(i, 0), affine_on_load(i, 2), i.activation,
                                             optional_value(i.gate), constant(i, 1), i.output_activation,
                                             optional_value(i.other), false, {}, {}, {}, {}, {}, 0, 0)));
      case Operation::pool:
        return set(i.output, std::get<0>(pool_variance_cpu(value(i.input), affine_on_load(i, 0), i.activation, false)));
      case Operation::squeeze_excite:
        return set(i.output,
                   std::get<0>(squeeze_excite_cpu(value(i.input), constant(i, 0), constant(i, 1), constant(i, 2),
                                                  constant(i, 3), i.activation, i.output_activation)));
      case Operation::normalize:
        return set(i.output,
                   batch_norm_apply_cpu(value(i.input), constant(i, 0), i.activation, optional_value(i.other)));
      case Operation::convolution:
        return set(i.output, dense_convolution(value(i.input), constant(i, 0), constant(i, 1), i.stride, i.padding,
                                               checked_activation(i.output_activation, "output_activation")));
      case Operation::linear:
        return set(i.output, linear(value(i.input), constant(i, 0), constant(i, 1),
                                    checked_activation(i.output_activation, "output_activation")));
      case Operation::average:
        return set(i.output, average_to(value(i.input), value(i.other)));
      case Operation::release:
        value(i.input);
        values_[i.input].reset();
        return;
      case Operation::quantize:
        return set(i.output, quantize(value(i.input), constant(i, 0)));
      case Operation::dequantize:
        return set(i.output, dequantize(value(i.input), constant(i, 0)));
      case Operation::quantized_convolution:
        return set(i.output, quantized_convolution(value(i.input), quantized(i)));
      case Operation::quantized_depthwise:
        return set(i.output, quantized_depthwise(value(i.input), quantized(i)));
      case Operation::quantized_pool:
        return set(i.output, quantized_pool(value(i.input), constant(i, 0)));
      case Operation::quantized_average:
        return set(i.output, quantized_average(value(i.input), value(i.other)));
      case Operation::quantized_gate:
        return set(i.output, quantized_gate(value(i.input), value(i.gate), constant(i, 0), constant(i, 1)));
      default:
        STD_TORCH_CHECK(false, "program: expected an operation below ", int64_t(Operation::count), ", got ",
                        i.operation);
    }
  }

  const std::vector<Tensor>& constants_;
  std::vector<OptionalTensor> values_;
};

}  // namespace

Tensor program_cpu(Tensor x, std::vector<Tensor> constants, std::vector<int64_t> code) {
  const TeamSession session(torch::stable::get_num_threads());
  return Machine(std::move(x), constants).run(code);
}

}  // namespace biasloss

// For bench/layers.py: from now on, programs on this thread add the nanoseconds of each row of their code to `of_rows`,
// until it is null.
extern "C" __attribute__((visibility("default"))) void biasloss_time_program(int64_t* of_rows) {
  biasloss::nanoseconds_of_rows = of_rows;
}
