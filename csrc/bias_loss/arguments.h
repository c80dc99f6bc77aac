// What the ops accept, whoever calls them: an exported program, C++, or the Python API, which leaves plain arguments to
// this check and words an error only where it refuses.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "../cpu/maps.h"
#include "statistics.h"

namespace biasloss {

class ArgumentCheck {
 public:
  // (N, K) or (N, K, S)
  explicit ArgumentCheck(const Tensor& output) : output_(output) {
    const auto size = output.sizes();
    STD_TORCH_CHECK(size.size() == 2 || size.size() == 3, "bias_loss: expected scores (N, K) or (N, K, S), got ",
                    size.size(), " dimensions");
    STD_TORCH_CHECK(is_floating(output), "bias_loss: expected floating-point scores");
    sum_dtype_ = accumulation_dtype(output.scalar_type());
    samples_ = size[0];
    classes_ = size[1];
    positions_ = size.size() == 3 ? size[2] : 1;
    STD_TORCH_CHECK(classes_ >= 1 && classes_ <= std::numeric_limits<int32_t>::max(),
                    "bias_loss: expected 1 to 2^31 - 1 classes, got ", classes_);
  }

  void of_forward(const std::optional<Tensor>& features, const std::optional<Tensor>& variance,
                  const std::optional<Tensor>& extrema, const Tensor& target, const std::optional<Tensor>& class_weight,
                  const std::optional<Tensor>& running_min) const {
    STD_TORCH_CHECK(features.has_value() != variance.has_value(), "bias_loss: give either features or variance");
    if (features) check_features(*features);
    if (variance) check_values("variance", *variance, samples_);
    if (extrema) check_values("extrema", *extrema, 2);
    if (class_weight) check_values("class weights", *class_weight, classes_);
    if (running_min) check_running_min(*running_min);
    check_target(target);
  }

  void of_backward(const Tensor& grad_loss, const Tensor& target, const std::optional<Tensor>& class_weight,
                   const Tensor& weight, const Tensor& statistics) const {
    STD_TORCH_CHECK(grad_loss.scalar_type() == sum_dtype_ && (grad_loss.dim() == 0 || is_one_per_row(grad_loss)),
                    "bias_loss: expected the gradient of the loss in its shape and dtype");
    check_device("gradient", grad_loss);
    if (class_weight) check_values("class weights", *class_weight, classes_);
    check_values("weight", weight, samples_);
    check_values("statistics", statistics, count_of_statistics(samples_ * positions_));
    check_target(target);
  }

 private:
  const Tensor& output_;
  ScalarType sum_dtype_;
  int64_t samples_, classes_, positions_;

  static bool is_floating(const Tensor& t) {
    const ScalarType dtype = t.scalar_type();
    return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
           dtype == ScalarType::BFloat16;
  }

  // (N) or (N, S)
  bool is_one_per_row(const Tensor& t) const {
    const auto size = t.sizes();
    return static_cast<int64_t>(size.size()) + 1 == output_.dim() && size[0] == samples_ &&
           (size.size() == 1 || size[1] == positions_);
  }

  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cpu() == output_.is_cpu() && t.get_device_index() == output_.get_device_index(),
                    "bias_loss: expected ", name, " on the device of the scores");
  }

  void check_features(const Tensor& features) const {
    const auto size = features.sizes();
    STD_TORCH_CHECK(size.size() >= 1 && size[0] == samples_, "bias_loss: expected features of ", samples_, " samples");
    STD_TORCH_CHECK(std::find(size.begin() + 1, size.end(), 0) == size.end(),
                    "bias_loss: expected at least one activation a sample");
    STD_TORCH_CHECK(is_floating(features), "bias_loss: expected floating-point features");
    check_device("features", features);
  }

  // One run of values in the dtype that scores are summed in.
  void check_values(const char* name, const Tensor& t, int64_t count) const {
    STD_TORCH_CHECK(t.scalar_type() == sum_dtype_ && t.numel() == count && t.is_contiguous(), "bias_loss: expected ",
                    count, " contiguous values of ", sum_dtype_ == ScalarType::Double ? "float64" : "float32", " as ",
                    name);
    check_device(name, t);
  }

  void check_running_min(const Tensor& running_min) const {
    STD_TORCH_CHECK(running_min.scalar_type() == ScalarType::Float && running_min.numel() == 1,
                    "bias_loss: expected one float32 value as running minimum");
    check_device("running minimum", running_min);
  }

  // Classes, or probabilities of the shape of the scores, in their dtype or the one they are summed in.
  void check_target(const Tensor& target) const {
    const ScalarType dtype = target.scalar_type();
    if (dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Byte) {
      STD_TORCH_CHECK(is_one_per_row(target), "bias_loss: expected one class for each of ", samples_, " x ", positions_,
                      " rows of scores");
    } else {
      const auto size = target.sizes(), expected = output_.sizes();
      STD_TORCH_CHECK(dtype == output_.scalar_type() || dtype == sum_dtype_,
                      "bias_loss: expected int64, int32 or uint8 classes, or probabilities in the dtype of the scores");
      STD_TORCH_CHECK(std::equal(size.begin(), size.end(), expected.begin(), expected.end()),
                      "bias_loss: expected probabilities of the shape of the scores");
    }
    check_device("target", target);
  }
};

}  // namespace biasloss
