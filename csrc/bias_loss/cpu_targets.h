// What the cross-entropy of a row of scores is taken against.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu_scores.h"

namespace biasloss {

// The class of a row. An ignored one need not be valid; one that is neither is the caller's error.
struct Label {
  int64_t value;
  bool ignored, valid;
};

// The first row whose class is out of range, whichever thread meets it.
class InvalidClass {
 public:
  void report(const RowClass& found) {
    if (found.row < 0) return;
    const std::lock_guard lock(mutex_);
    if (found.row < first_.row) first_ = found;
  }
  void throw_if_any(const ScoreTensor& scores) const {
    if (first_.row == kNone) return;
    // Python raises an IndexError for this type.
    throw std::out_of_range("target of sample " + std::to_string(first_.row / scores.positions) + " is " +
                            std::to_string(first_.value) + ", expected a class in [0, " +
                            std::to_string(scores.classes) + ")");
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::mutex mutex_;
  RowClass first_ = {kNone, 0};
};

// A class, or a distribution over the classes where there are probabilities or smoothing. q_k holds the class weight as
// well; the loss is -sum_k q_k log p_k, its gradient (sum_j q_j) p_k - q_k.
template <class Scalar>
class Targets {
 public:
  Targets(const torch::stable::Tensor& target, const ScoreTensor& scores, const Scalar* class_weight,
          int64_t ignore_index, double label_smoothing)
      : classes_(scores.classes),
        class_weight_(class_weight),
        ignore_index_(ignore_index),
        smoothing_(static_cast<Scalar>(label_smoothing)) {
    using torch::headeronly::ScalarType;
    const ScalarType dtype = target.scalar_type();
    if (dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Byte)
      indices_.emplace(target);
    else
      probabilities_.emplace(target);
  }

  bool soft() const { return probabilities_ || smoothing_ != Scalar(0); }
  // The one look at a row's class: the memory may belong to someone who changes it meanwhile.
  Label label(int64_t row) const {
    if (!indices_) return {0, false, true};
    const int64_t value = (*indices_)[row];
    return {value, value == ignore_index_, value >= 0 && value < classes_};
  }
  // The labels of a block of rows, -1 for those that do not count. Returns the first invalid
  // one; row -1 for none.
  RowClass labels(int64_t first, int64_t count, int32_t* to, int64_t* counted) const {
    if (indices_) return indices_->read(first, count, classes_, ignore_index_, to, counted);
    std::fill_n(to, count, 0);
    *counted = count;
    return {-1, 0};
  }
  bool weighted() const { return class_weight_ != nullptr && !probabilities_; }
  Scalar weight_of(int64_t k) const { return class_weight_ == nullptr ? Scalar(1) : class_weight_[k]; }
  // How much a counted row adds to the denominator of the mean.
  Scalar count(const Label& label) const { return probabilities_ ? Scalar(1) : weight_of(label.value); }

  // Writes q and returns its sum.
  Scalar distribution(int64_t row, const Label& label, Scalar* q) const {
    const Scalar uniform = smoothing_ / Scalar(classes_), sharp = Scalar(1) - smoothing_;
    if (probabilities_) {
      const Scalar* p = probabilities_->read(row, q);
      for (int64_t k = 0; k < classes_; ++k)
        q[k] = weight_of(k) * (smoothing_ == Scalar(0) ? p[k] : p[k] * sharp + uniform);
    } else {
      for (int64_t k = 0; k < classes_; ++k) q[k] = weight_of(k) * uniform;
      q[label.value] += weight_of(label.value) * sharp;
    }
    double total[4] = {};  // chains of additions side by side
    for (int64_t k = 0; k < classes_; ++k) total[k % 4] += q[k];
    return static_cast<Scalar>(total[0] + total[1] + (total[2] + total[3]));
  }

  // The same for a block of rows: q of (classes, width), and the sums in rows.total. Only rows that count need be
  // right.
  void distributions(int64_t first, int64_t count, int64_t width, LaneRows<Scalar>& rows, Scalar* q,
                     Scalar* spare) const {
    const Scalar uniform = smoothing_ / Scalar(classes_), sharp = Scalar(1) - smoothing_;
    if (probabilities_) {
      probabilities_->load_lanes(first, count, q, width, spare);
      for (int64_t k = 0; k < classes_; ++k)
        for (int64_t r = 0; r < count; ++r) {
          const Scalar p = q[k * width + r];
          q[k * width + r] = weight_of(k) * (smoothing_ == Scalar(0) ? p : p * sharp + uniform);
        }
    } else {
      for (int64_t k = 0; k < classes_; ++k)
        for (int64_t r = 0; r < width; ++r) q[k * width + r] = weight_of(k) * uniform;
      for (int64_t r = 0; r < count; ++r)
        if (rows.label[r] >= 0) q[rows.label[r] * width + r] += weight_of(rows.label[r]) * sharp;
    }
    double total[64] = {};
    for (int64_t k = 0; k < classes_; ++k)
      for (int64_t r = 0; r < count; ++r) total[r] += q[k * width + r];
    for (int64_t r = 0; r < count; ++r) rows.total[r] = static_cast<Scalar>(total[r]);
  }

 private:
  int64_t classes_;
  const Scalar* class_weight_;
  int64_t ignore_index_;
  Scalar smoothing_;
  std::optional<ClassTargets> indices_;
  std::optional<ScoreTensor> probabilities_;
};

}  // namespace biasloss
