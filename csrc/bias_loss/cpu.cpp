#include "../feature_variance/cpu.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "../cpu/empty.h"
#include "../cpu/parallel.h"
#include "../math/bias_weight.h"
#include "arguments.h"
#include "cpu_scores.h"
#include "cpu_targets.h"
#include "ops.h"
#include "statistics.h"

namespace biasloss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// exp and log make a score about as dear as this many activations of the variance.
constexpr int64_t kActivationsPerScore = 8;

// Up to how many classes rows are computed as lanes. The forward pass reduces every row twice; the backward pass
// reduces nothing, and would have to transpose the scores and the gradient.
constexpr int64_t kFewClassesForward = 128, kFewClassesBackward = 15;

// Rows are summed in pieces whose length follows from the shape: the result does not depend on the number of threads.
// Where samples have several positions no piece spans two, and the weight of a sample, known only at the end,
// multiplies sums of its rows; where they have one, the loss of every row is kept.
struct RowPieces {
  explicit RowPieces(const ScoreTensor& scores)
      : single(scores.positions == 1),
        line(single ? scores.samples : scores.positions),
        length(length_of(scores)),
        per_line((line + length - 1) / length),
        count((single ? 1 : scores.samples) * per_line) {}
  int64_t begin(int64_t piece) const { return piece / per_line * line + piece % per_line * length; }
  int64_t end(int64_t piece) const { return std::min(begin(piece) + length, (piece / per_line + 1) * line); }
  int64_t sample(int64_t piece) const { return piece / per_line; }

  bool single;
  int64_t line, length, per_line, count;

 private:
  static int64_t length_of(const ScoreTensor& scores) {
    constexpr int64_t longest = 1024, most_scores = 65536;
    int64_t length = longest;
    while (length > 1 && length * scores.classes > most_scores) length /= 2;
    return scores.prefers_lanes(kFewClassesForward) ? std::max(length, scores.lanes()) : length;
  }
};

struct PieceSums {
  double loss = 0, count = 0;
};

// What a thread computes a row, or a block of rows, with.
template <class Scalar>
class RowScratch {
 public:
  RowScratch(const ScoreTensor& scores, bool as_lanes)
      : part_(scores.classes * (as_lanes ? scores.lanes() : 1)),
        buffer_(std::make_unique_for_overwrite<Scalar[]>(static_cast<size_t>(3 * part_))) {}
  Scalar* scores() const { return buffer_.get(); }
  Scalar* targets() const { return buffer_.get() + part_; }
  Scalar* spare() const { return buffer_.get() + 2 * part_; }

 private:
  int64_t part_;
  std::unique_ptr<Scalar[]> buffer_;
};

template <class Scalar>
struct Forward {
  const ScoreTensor& scores;
  const Targets<Scalar>& targets;
  const Statistics<Scalar> statistics;
  Scalar* losses;  // of every row, unweighted; null where only the sums of pieces are wanted
  const RowPieces& pieces;
  PieceSums* sums;
  InvalidClass invalid_class = {};

  // All rows of pieces [first, last).
  void run(int64_t first, int64_t last) {
    if (first == last) return;
    const bool as_lanes = scores.prefers_lanes(kFewClassesForward);
    const RowScratch<Scalar> scratch(scores, as_lanes);
    const int64_t step = as_lanes ? scores.lanes() : 1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t end = pieces.end(i);
      for (int64_t row = pieces.begin(i); row < end; row += step)
        as_lanes ? run_lanes(row, std::min(step, end - row), sums[i], scratch) : run_row(row, sums[i], scratch);
    }
  }

 private:
  void run_row(int64_t row, PieceSums& sum, const RowScratch<Scalar>& scratch) {
    Scalar loss = 0;
    statistics.row_max[row] = statistics.row_log_sum[row] = 0;
    const Label label = targets.label(row);
    if (!label.ignored) {
      if (!label.valid) return invalid_class.report({row, label.value});
      loss = loss_of(row, label, scratch);
      sum.count += targets.count(label);
    }
    if (losses != nullptr) losses[row] = loss;
    sum.loss += loss;
  }

  void run_lanes(int64_t first, int64_t count, PieceSums& sum, const RowScratch<Scalar>& scratch) {
    const LaneTable<Scalar>& table = lane_tables().of(Scalar());
    const int64_t width = scores.lanes();
    Scalar *x = scratch.scores(), *q = scratch.targets();
    LaneRows<Scalar> rows;
    int64_t counted = 0;
    invalid_class.report(targets.labels(first, count, rows.label, &counted));
    std::fill(rows.label + count, rows.label + width, -1);
    scores.load_lanes(first, count, x, width, scratch.spare());
    table.max_and_log_sum(x, scores.classes, width, count, &rows);
    if (targets.soft()) {
      targets.distributions(first, count, width, rows, q, scratch.spare());
      table.soft_loss(x, q, scores.classes, width, count, &rows);
    } else {
      table.hard_loss(x, scores.classes, width, count, &rows);
    }
    double weights = double(counted);
    if (targets.weighted()) {
      weights = 0;
      for (int64_t r = 0; r < count; ++r) {
        const Scalar of_class = rows.label[r] >= 0 ? targets.weight_of(rows.label[r]) : Scalar(0);
        if (!targets.soft()) rows.loss[r] *= rows.label[r] >= 0 ? of_class : Scalar(1);
        weights += of_class;
      }
    }
    sum.loss += table.sum(rows.loss, count);
    sum.count += weights;
    std::copy_n(rows.max, count, statistics.row_max + first);
    std::copy_n(rows.log_sum, count, statistics.row_log_sum + first);
    if (losses != nullptr) std::copy_n(rows.loss, count, losses + first);
  }

  Scalar loss_of(int64_t row, const Label& label, const RowScratch<Scalar>& scratch) {
    const RowTable<Scalar>& table = row_tables().of(Scalar());
    const Scalar* x = scores.read(row, scratch.scores());
    Scalar &max = statistics.row_max[row], &log_sum = statistics.row_log_sum[row];
    table.max_and_log_sum(x, scores.classes, &max, &log_sum);
    if (!targets.soft()) {
      const int64_t t = label.value;
      return (log_sum - (x[t] - max)) * targets.weight_of(t);
    }
    targets.distribution(row, label, scratch.targets());
    return table.soft_loss(x, scratch.targets(), scores.classes, max, log_sum);
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
    const auto smallest = static_cast<float>(-extrema.negated_min);
    if (update && !(*running_min <= smallest)) *running_min = smallest;  // a NaN does not stay
  }
  const Scalar range = extrema.max + extrema.negated_min;
  if (range == Scalar(0)) return void(std::fill_n(weight, samples, Scalar(1) - Scalar(beta)));
  lane_tables().of(Scalar()).weigh(weight, samples, low, range, Scalar(alpha), Scalar(beta));
}

struct LossOptions {
  double alpha, beta;
  bool update_running_min;
  int64_t reduction, ignore_index;
  double label_smoothing;
};

template <class Scalar>
BiasLossResult forward(const std::optional<Tensor>& features, const std::optional<Tensor>& variance,
                       const std::optional<Tensor>& extrema, const Tensor& output, const Tensor& target,
                       const std::optional<Tensor>& class_weight, const std::optional<Tensor>& running_min,
                       const LossOptions& options) {
  const ScalarType dtype = std::is_same_v<Scalar, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t reduction = options.reduction;
  const ScoreTensor scores(output);
  const Targets<Scalar> targets(target, scores, class_weight ? class_weight->const_data_ptr<Scalar>() : nullptr,
                                options.ignore_index, options.label_smoothing);
  Tensor weight = empty_tensor({scores.samples}, dtype);
  Tensor statistics = empty_tensor({count_of_statistics(scores.rows())}, dtype);
  Tensor loss = reduction != kNone ? empty_tensor({}, dtype)
                : output.dim() > 2 ? empty_tensor({scores.samples, scores.positions}, dtype)
                                   : empty_tensor({scores.samples}, dtype);
  Scalar* losses = reduction == kNone ? loss.mutable_data_ptr<Scalar>() : nullptr;
  // One parallel region over both inputs: every thread takes its share of the features and its share of the rows.
  std::optional<FeatureMoments> moments;
  if (features) moments.emplace(*features);
  const RowPieces pieces(scores);
  std::vector<PieceSums> sums(static_cast<size_t>(pieces.count));
  std::unique_ptr<Scalar[]> kept;
  if (losses == nullptr && pieces.single) {
    kept = std::make_unique_for_overwrite<Scalar[]>(static_cast<size_t>(scores.rows()));
    losses = kept.get();
  }
  Forward<Scalar> rows{scores, targets, {statistics.mutable_data_ptr<Scalar>(), scores.rows()},
                       losses, pieces,  sums.data()};
  const int64_t elements =
      scores.rows() * scores.classes * kActivationsPerScore + (moments ? moments->activations() : 0);
  parallel_shares(elements, [&](int64_t share, int64_t shares) {
    if (moments) moments->compute(moments->pieces() * share / shares, moments->pieces() * (share + 1) / shares);
    rows.run(pieces.count * share / shares, pieces.count * (share + 1) / shares);
  });
  rows.invalid_class.throw_if_any(scores);

  Scalar* w = weight.mutable_data_ptr<Scalar>();
  if (moments)
    for (int64_t i = 0; i < scores.samples; ++i) w[i] = static_cast<Scalar>(moments->variance(i));
  else
    std::copy_n(variance->const_data_ptr<Scalar>(), scores.samples, w);
  Extrema<Scalar> reached = extrema_of_batch(w, scores.samples);
  if (extrema) reached = {extrema->const_data_ptr<Scalar>()[0], extrema->const_data_ptr<Scalar>()[1]};
  weigh(w, scores.samples, reached, running_min ? running_min->mutable_data_ptr<float>() : nullptr,
        options.update_running_min, options.alpha, options.beta);

  double total = 0, count = 0;
  for (int64_t i = 0; i < pieces.count; ++i) {
    if (!pieces.single) total += w[pieces.sample(i)] * sums[i].loss;
    count += sums[i].count;
  }
  for (int64_t i = 0; pieces.single && i < scores.samples; ++i) total += double(w[i]) * double(losses[i]);
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

// grad_loss of a row: one value for all, or (N) or (N, S) with any strides.
template <class Scalar>
class LossGradient {
 public:
  LossGradient(const Tensor& t, int64_t positions)
      : data_(t.const_data_ptr<Scalar>()),
        positions_(positions),
        sample_stride_(t.dim() > 0 ? t.stride(0) : 0),
        position_stride_(t.dim() > 1 ? t.stride(1) : 0) {}
  bool is_one() const { return sample_stride_ == 0 && position_stride_ == 0; }
  Scalar of_sample(int64_t sample) const { return data_[sample * sample_stride_]; }
  Scalar operator[](int64_t row) const {
    return data_[row / positions_ * sample_stride_ + row % positions_ * position_stride_];
  }

 private:
  const Scalar* data_;
  int64_t positions_, sample_stride_, position_stride_;
};

template <class Scalar>
struct Backward {
  const ScoreTensor& scores;
  const ScoreTensor& gradient;
  const Targets<Scalar>& targets;
  const Statistics<const Scalar> statistics;
  const Scalar* weight;
  const LossGradient<Scalar> grad_loss;
  InvalidClass invalid_class = {};  // targets that changed since the forward pass

  void run(int64_t begin, int64_t end) {
    if (begin == end) return;
    const bool as_lanes = scores.prefers_lanes(kFewClassesBackward);
    const RowScratch<Scalar> scratch(scores, as_lanes);
    if (!as_lanes) {
      for (int64_t row = begin; row < end; ++row) run_row(row, scratch);
      return;
    }
    for (int64_t row = begin, count; row < end; row += count) {
      count = std::min({scores.lanes(), end - row, scores.end_of_run(row) - row});
      run_lanes(row, count, scratch);
    }
  }

 private:
  void set_scales(int64_t first, int64_t count, LaneRows<Scalar>& rows) const {
    const Scalar denominator = *statistics.denominator;
    if (scores.positions == 1) {
      const Scalar* of_sample = weight + first;
      for (int64_t r = 0; r < count; ++r) rows.scale[r] = grad_loss.of_sample(first + r) * of_sample[r] / denominator;
    } else if (grad_loss.is_one()) {
      std::fill_n(rows.scale, count, scale_of(first));
    } else {
      for (int64_t r = 0; r < count; ++r) rows.scale[r] = scale_of(first + r);
    }
    if (targets.weighted() && !targets.soft())
      for (int64_t r = 0; r < count; ++r) rows.scale[r] *= targets.weight_of(std::max(rows.label[r], 0));
  }

  Scalar scale_of(int64_t row) const {
    return grad_loss[row] * weight[row / scores.positions] / *statistics.denominator;
  }

  void run_row(int64_t row, const RowScratch<Scalar>& scratch) {
    const RowTable<Scalar>& table = row_tables().of(Scalar());
    Scalar* g = gradient.destination(row, scratch.scores());
    const Label label = targets.label(row);
    if (label.ignored || !label.valid) {
      if (!label.ignored) invalid_class.report({row, label.value});
      std::fill_n(g, scores.classes, Scalar(0));
    } else {
      // Reading into the buffer that the gradient overwrites is fine: element k is read before it is written.
      const Scalar* x = scores.read(row, scratch.scores());
      const Scalar max = statistics.row_max[row], log_sum = statistics.row_log_sum[row];
      const Scalar scale = scale_of(row);
      if (targets.soft()) {
        const Scalar total = targets.distribution(row, label, scratch.targets());
        table.soft_gradient(x, scratch.targets(), scores.classes, max, log_sum, scale, total, g);
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

  void run_lanes(int64_t first, int64_t count, const RowScratch<Scalar>& scratch) {
    const LaneTable<Scalar>& table = lane_tables().of(Scalar());
    const int64_t width = scores.lanes();
    LaneRows<Scalar> rows;
    int64_t counted = 0;
    invalid_class.report(targets.labels(first, count, rows.label, &counted));
    std::fill(rows.label + count, rows.label + width, -1);
    std::copy_n(statistics.row_max + first, count, rows.max);
    std::copy_n(statistics.row_log_sum + first, count, rows.log_sum);
    set_scales(first, count, rows);
    Scalar* x = scratch.scores();
    scores.load_lanes(first, count, x, width, scratch.spare());
    if (targets.soft()) {
      targets.distributions(first, count, width, rows, scratch.targets(), scratch.spare());
      table.soft_gradient(x, scratch.targets(), scores.classes, width, rows, count);
    } else {
      table.hard_gradient(x, scores.classes, width, rows, count);
    }
    gradient.store_lanes(first, count, x, width, scratch.spare());
  }
};

template <class Scalar>
Tensor backward(const Tensor& grad_loss, const Tensor& output, const Tensor& target,
                const std::optional<Tensor>& class_weight, const Tensor& weight, const Tensor& statistics,
                int64_t ignore_index, double label_smoothing) {
  Tensor grad_output = empty_tensor_like(output);
  const ScoreTensor scores(output), gradient(grad_output);
  const Targets<Scalar> targets(target, scores, class_weight ? class_weight->const_data_ptr<Scalar>() : nullptr,
                                ignore_index, label_smoothing);
  Backward<Scalar> rows{scores,
                        gradient,
                        targets,
                        {statistics.const_data_ptr<Scalar>(), scores.rows()},
                        weight.const_data_ptr<Scalar>(),
                        {grad_loss, std::max<int64_t>(scores.positions, 1)}};
  parallel_shares(scores.rows() * scores.classes * kActivationsPerScore, [&](int64_t share, int64_t shares) {
    rows.run(scores.rows() * share / shares, scores.rows() * (share + 1) / shares);
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
  return run(features, variance, extrema, output, target, class_weight, running_min,
             {alpha, beta, update_running_min, reduction, ignore_index, label_smoothing});
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
