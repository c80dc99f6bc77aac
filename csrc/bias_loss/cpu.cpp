#include "../feature_variance/cpu.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/empty.h"
#include "../cpu/parallel.h"
#include "../math/bias_weight.h"
#include "arguments.h"
#include "cpu_scores.h"
#include "ops.h"
#include "statistics.h"

namespace biasloss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// exp and log make a score about as dear as this many activations of the variance.
constexpr int64_t kActivationsPerScore = 8;

// The class of a row. An ignored one need not be valid; one that is neither is the caller's error.
struct Label {
  int64_t value;
  bool ignored, valid;
};

// The first row whose class is out of range, whichever thread meets it.
class InvalidClass {
 public:
  void report(int64_t row, int64_t value) {
    const std::lock_guard lock(mutex_);
    if (row >= row_) return;
    row_ = row;
    value_ = value;
  }
  void throw_if_any(const ScoreTensor& scores) const {
    if (row_ == kNone) return;
    // Python raises an IndexError for this type.
    throw std::out_of_range("target of sample " + std::to_string(row_ / scores.positions) + " is " +
                            std::to_string(value_) + ", expected a class in [0, " + std::to_string(scores.classes) +
                            ")");
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::mutex mutex_;
  int64_t row_ = kNone, value_ = 0;
};

// What a row's cross-entropy is taken against: a class, or a distribution over the classes where there are
// probabilities or smoothing. q_k holds the class weight as well; the loss is -sum_k q_k log p_k, its gradient (sum_j
// q_j) p_k - q_k.
template <class Scalar>
class Targets {
 public:
  Targets(const Tensor& target, const ScoreTensor& scores, const Scalar* class_weight, int64_t ignore_index,
          double label_smoothing)
      : classes_(scores.classes),
        class_weight_(class_weight),
        ignore_index_(ignore_index),
        smoothing_(static_cast<Scalar>(label_smoothing)) {
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
    double total = 0;
    for (int64_t k = 0; k < classes_; ++k) total += q[k];
    return static_cast<Scalar>(total);
  }

 private:
  int64_t classes_;
  const Scalar* class_weight_;
  int64_t ignore_index_;
  Scalar smoothing_;
  std::optional<ClassTargets> indices_;
  std::optional<ScoreTensor> probabilities_;
};

// Rows are summed in pieces of a fixed length, none of which spans two samples: the result does not depend on the
// number of threads, and the weight of a sample, known only at the end, multiplies sums of its rows.
struct RowPieces {
  static constexpr int64_t kLength = 1024;
  explicit RowPieces(const ScoreTensor& scores)
      : positions(scores.positions),
        per_sample((positions + kLength - 1) / kLength),
        count(scores.samples * per_sample) {}
  int64_t begin(int64_t piece) const { return piece / per_sample * positions + piece % per_sample * kLength; }
  int64_t end(int64_t piece) const { return std::min(begin(piece) + kLength, (piece / per_sample + 1) * positions); }
  int64_t positions, per_sample, count;
};

struct PieceSums {
  double loss = 0, count = 0;
};

template <class Scalar>
struct Forward {
  const ScoreTensor& scores;
  const Targets<Scalar>& targets;
  const Statistics<Scalar> statistics;
  Scalar* losses;  // of every row, unweighted; null where only sums are wanted
  InvalidClass invalid_class = {};

  PieceSums run(int64_t begin, int64_t end, Scalar* row_scratch, Scalar* target_scratch) {
    PieceSums sums;
    for (int64_t row = begin; row < end; ++row) {
      Scalar loss = 0;
      statistics.row_max[row] = statistics.row_log_sum[row] = 0;
      const Label label = targets.label(row);
      if (!label.ignored) {
        if (!label.valid) {
          invalid_class.report(row, label.value);
          continue;
        }
        loss = loss_of(row, label, row_scratch, target_scratch);
        sums.count += targets.count(label);
      }
      if (losses != nullptr) losses[row] = loss;
      sums.loss += loss;
    }
    return sums;
  }

 private:
  Scalar loss_of(int64_t row, const Label& label, Scalar* row_scratch, Scalar* target_scratch) {
    const RowTable<Scalar>& table = row_table<Scalar>();
    const Scalar* x = scores.read(row, row_scratch);
    Scalar &max = statistics.row_max[row], &log_sum = statistics.row_log_sum[row];
    table.max_and_log_sum(x, scores.classes, &max, &log_sum);
    if (!targets.soft()) {
      const int64_t t = label.value;
      return (log_sum - (x[t] - max)) * targets.weight_of(t);
    }
    targets.distribution(row, label, target_scratch);
    return table.soft_loss(x, target_scratch, scores.classes, max, log_sum);
  }
};

template <class Scalar>
Extrema<Scalar> extrema_of_batch(const Scalar* variance, int64_t samples) {
  Extrema<Scalar> extrema = empty_extrema<Scalar>();
  for (int64_t i = 0; i < samples; ++i) extrema = merge(extrema, extrema_of(variance[i]));
  return extrema;
}

// Turns variances into weights in place, and moves the running minimum.
template <class Scalar>
void weigh(Scalar* weight, int64_t samples, const Extrema<Scalar>& extrema, float* running_min, bool update,
           double alpha, double beta) {
  if (!is_finite_batch(extrema)) {
    std::fill_n(weight, samples, std::numeric_limits<Scalar>::quiet_NaN());
    return;
  }
  Scalar low = -extrema.negated_min;
  if (running_min != nullptr) {
    if (Scalar(*running_min) < low) low = *running_min;
    if (update) *running_min = std::min(*running_min, static_cast<float>(-extrema.negated_min));
  }
  for (int64_t i = 0; i < samples; ++i) weight[i] = bias_weight<Scalar>(weight[i], low, extrema, alpha, beta);
}

template <class Scalar>
BiasLossResult forward(const std::optional<Tensor>& features, const std::optional<Tensor>& variance,
                       const std::optional<Tensor>& extrema, const Tensor& output, const Tensor& target,
                       const std::optional<Tensor>& class_weight, const std::optional<Tensor>& running_min,
                       double alpha, double beta, bool update_running_min, int64_t reduction, int64_t ignore_index,
                       double label_smoothing) {
  const ScalarType dtype = std::is_same_v<Scalar, double> ? ScalarType::Double : ScalarType::Float;
  const ScoreTensor scores(output);
  const Targets<Scalar> targets(target, scores, class_weight ? class_weight->const_data_ptr<Scalar>() : nullptr,
                                ignore_index, label_smoothing);
  Tensor weight = empty_tensor({scores.samples}, dtype);
  Tensor statistics = empty_tensor({count_of_statistics(scores.rows())}, dtype);
  Tensor loss = reduction != kNone ? empty_tensor({}, dtype)
                : output.dim() > 2 ? empty_tensor({scores.samples, scores.positions}, dtype)
                                   : empty_tensor({scores.samples}, dtype);
  Scalar* losses = reduction == kNone ? loss.mutable_data_ptr<Scalar>() : nullptr;
  Forward<Scalar> rows{scores, targets, {statistics.mutable_data_ptr<Scalar>(), scores.rows()}, losses};

  // One parallel region over both inputs: every thread takes its share of the features and its share of the rows.
  std::optional<FeatureMoments> moments;
  if (features) moments.emplace(*features);
  const RowPieces pieces(scores);
  std::vector<PieceSums> sums(static_cast<size_t>(pieces.count));
  const int64_t elements =
      scores.rows() * scores.classes * kActivationsPerScore + (moments ? moments->activations() : 0);
  parallel_shares(elements, [&](int64_t share, int64_t shares) {
    if (moments) moments->compute(moments->pieces() * share / shares, moments->pieces() * (share + 1) / shares);
    std::vector<Scalar> scratch(static_cast<size_t>(2 * scores.classes));
    for (int64_t i = pieces.count * share / shares; i < pieces.count * (share + 1) / shares; ++i)
      sums[i] = rows.run(pieces.begin(i), pieces.end(i), scratch.data(), scratch.data() + scores.classes);
  });
  rows.invalid_class.throw_if_any(scores);

  Scalar* w = weight.mutable_data_ptr<Scalar>();
  for (int64_t i = 0; i < scores.samples; ++i)
    w[i] = static_cast<Scalar>(moments ? moments->variance(i) : variance->const_data_ptr<Scalar>()[i]);
  Extrema<Scalar> reached = extrema_of_batch(w, scores.samples);
  if (extrema) reached = {extrema->const_data_ptr<Scalar>()[0], extrema->const_data_ptr<Scalar>()[1]};
  weigh(w, scores.samples, reached, running_min ? running_min->mutable_data_ptr<float>() : nullptr, update_running_min,
        alpha, beta);

  double total = 0, count = 0;
  for (int64_t i = 0; i < pieces.count; ++i) {
    total += w[i / pieces.per_sample] * sums[i].loss;
    count += sums[i].count;
  }
  *rows.statistics.denominator = static_cast<Scalar>(reduction == kMean ? count : 1.0);
  if (reduction != kNone) {
    *loss.mutable_data_ptr<Scalar>() = static_cast<Scalar>(reduction == kMean ? total / count : total);
  } else {
    parallel_shares(scores.rows(), [&](int64_t share, int64_t shares) {
      for (int64_t row = scores.rows() * share / shares; row < scores.rows() * (share + 1) / shares; ++row)
        losses[row] *= w[row / scores.positions];
    });
  }
  return {loss, weight, statistics};
}

template <class Scalar>
struct Backward {
  const ScoreTensor& scores;
  const ScoreTensor& gradient;
  const Targets<Scalar>& targets;
  const Statistics<const Scalar> statistics;
  const Scalar* weight;

  InvalidClass invalid_class = {};  // targets that changed since the forward pass

  void run(int64_t row, Scalar grad_loss, Scalar* row_scratch, Scalar* target_scratch) {
    const RowTable<Scalar>& table = row_table<Scalar>();
    Scalar* g = gradient.destination(row, row_scratch);
    const Label label = targets.label(row);
    if (label.ignored || !label.valid) {
      if (!label.ignored) invalid_class.report(row, label.value);
      std::fill_n(g, scores.classes, Scalar(0));
    } else {
      // Reading into the buffer that the gradient overwrites is fine: element k is read before it is written.
      const Scalar* x = scores.read(row, row_scratch);
      const Scalar max = statistics.row_max[row], log_sum = statistics.row_log_sum[row];
      const Scalar scale = grad_loss * weight[row / scores.positions] / *statistics.denominator;
      if (targets.soft()) {
        const Scalar total = targets.distribution(row, label, target_scratch);
        table.soft_gradient(x, target_scratch, scores.classes, max, log_sum, scale, total, g);
      } else {
        const int64_t t = label.value;
        const Scalar scale_of_class = scale * targets.weight_of(t);
        const Scalar log_p = (x[t] - max) - log_sum;
        table.hard_gradient(x, scores.classes, max, log_sum, scale_of_class, g);
        // p - 1, without the cancellation of a confident prediction
        g[t] = log_p > Scalar(-0.5) ? std::expm1(log_p) * scale_of_class : g[t] - scale_of_class;
      }
    }
    gradient.write(row, g);
  }
};

// grad_loss of a row: one value for all, or (N) or (N, S) with any strides.
template <class Scalar>
class LossGradient {
 public:
  LossGradient(const Tensor& t, int64_t positions)
      : data_(t.const_data_ptr<Scalar>()),
        positions_(positions),
        sample_stride_(t.dim() > 0 ? t.stride(0) : 0),
        position_stride_(t.dim() > 1 ? t.stride(1) : 0) {}
  Scalar operator[](int64_t row) const {
    return data_[row / positions_ * sample_stride_ + row % positions_ * position_stride_];
  }

 private:
  const Scalar* data_;
  int64_t positions_, sample_stride_, position_stride_;
};

template <class Scalar>
Tensor backward(const Tensor& grad_loss, const Tensor& output, const Tensor& target,
                const std::optional<Tensor>& class_weight, const Tensor& weight, const Tensor& statistics,
                int64_t ignore_index, double label_smoothing) {
  Tensor grad_output = empty_tensor_like(output);
  const ScoreTensor scores(output), gradient(grad_output);
  const Targets<Scalar> targets(target, scores, class_weight ? class_weight->const_data_ptr<Scalar>() : nullptr,
                                ignore_index, label_smoothing);
  const LossGradient<Scalar> grad(grad_loss, std::max<int64_t>(scores.positions, 1));
  Backward<Scalar> rows{
      scores, gradient, targets, {statistics.const_data_ptr<Scalar>(), scores.rows()}, weight.const_data_ptr<Scalar>()};
  parallel_shares(scores.rows() * scores.classes * kActivationsPerScore, [&](int64_t share, int64_t shares) {
    std::vector<Scalar> scratch(static_cast<size_t>(2 * scores.classes));
    for (int64_t row = scores.rows() * share / shares; row < scores.rows() * (share + 1) / shares; ++row)
      rows.run(row, grad[row], scratch.data(), scratch.data() + scores.classes);
  });
  rows.invalid_class.throw_if_any(scores);
  return grad_output;
}

}  // namespace

BiasLossResult bias_loss_cpu(std::optional<Tensor> features, std::optional<Tensor> variance,
                             std::optional<Tensor> extrema, Tensor output, Tensor target,
                             std::optional<Tensor> class_weight, std::optional<Tensor> running_min, double alpha,
                             double beta, bool update_running_min, int64_t reduction, int64_t ignore_index,
                             double label_smoothing) {
  ArgumentCheck(output).of_forward(features, variance, extrema, target, class_weight, running_min);
  const auto run = output.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(features, variance, extrema, output, target, class_weight, running_min, alpha, beta, update_running_min,
             reduction, ignore_index, label_smoothing);
}

Tensor bias_loss_backward_cpu(Tensor grad_loss, Tensor output, Tensor target, std::optional<Tensor> class_weight,
                              Tensor weight, Tensor statistics,
                              int64_t /*reduction: the denominator holds what it needs of it*/, int64_t ignore_index,
                              double label_smoothing) {
  ArgumentCheck(output).of_backward(grad_loss, target, class_weight, weight, statistics);
  const auto run = output.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad_loss, output, target, class_weight, weight, statistics, ignore_index, label_smoothing);
}

}  // namespace biasloss
