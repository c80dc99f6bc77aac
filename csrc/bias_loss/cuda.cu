#include <limits>

#include "../cpu/maps.h"
#include "../cuda/launch.h"
#include "../cuda/tensors.h"
#include "../cuda/ticket_slots.h"
#include "../feature_variance/ops.h"
#include "arguments.h"
#include "kernels.cuh"
#include "ops.h"
#include "statistics.h"

namespace biasloss {
namespace {

// (N, K) or (N, K, S)
ScoreStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 0}; }

struct ScoreOptions {
  int64_t ignore_index;
  double label_smoothing;
};

TargetKind kind_of(const Tensor& target, const Tensor& output) {
  switch (target.scalar_type()) {
    case ScalarType::Long:
      return TargetKind::kInt64;
    case ScalarType::Int:
      return TargetKind::kInt32;
    case ScalarType::Byte:
      return TargetKind::kUInt8;
    default:
      return target.scalar_type() == output.scalar_type() ? TargetKind::kProbability : TargetKind::kWideProbability;
  }
}

// Class indices as one run, probabilities as they are.
Tensor readable_target(const Tensor& target, const Tensor& output) {
  if (is_probability(kind_of(target, output)) || target.is_contiguous()) return target;
  return torch::stable::contiguous(target);
}

template <class T, class Acc>
ScoreBatch<T, Acc> score_batch(const Tensor& output, const Tensor& target, const std::optional<Tensor>& class_weight,
                               const ScoreOptions& options) {
  ScoreBatch<T, Acc> b{};
  b.output = data_of<T>(output);
  b.output_stride = strides_of(output);
  b.target = target.const_data_ptr();
  b.target_kind = kind_of(target, output);
  if (is_probability(b.target_kind)) b.target_stride = strides_of(target);
  b.class_weight = data_of<Acc>(class_weight);
  b.samples = output.size(0);
  b.classes = static_cast<unsigned>(output.size(1));
  b.positions = output.dim() == 3 ? output.size(2) : 1;
  b.ignore_index = options.ignore_index;
  b.label_smoothing = static_cast<Acc>(options.label_smoothing);
  return b;
}

struct Outputs {
  Tensor loss, weight, statistics;
};

struct BatchOptions {
  double alpha;
  double beta;
  bool update_running_min;
  Reduction reduction;
};

template <class T, class Acc>
void launch_forward(const LaunchContext& context, const std::optional<Tensor>& features,
                    const std::optional<Tensor>& variance, const std::optional<Tensor>& extrema,
                    const ScoreBatch<T, Acc>& scores, const std::optional<Tensor>& running_min,
                    const BatchOptions& options, const Outputs& out) {
  ForwardParameters<T, Acc> p{};
  const int64_t activations = features.has_value() ? features->numel() / scores.samples : 0;
  const ForwardPlan plan =
      plan_forward(scores.samples, scores.classes, scores.positions, scores.output_stride.klass == 1,
                   features.has_value(), activations, sizeof(T), multiprocessors(context.device()));
  if (features.has_value())
    p.features = {data_of<T>(*features), features->stride(0), activations,
                  slice_length(activations, plan.splits, sizeof(T))};
  p.variance = data_of<Acc>(variance);
  p.extrema = data_of<Acc>(extrema);
  p.scores = scores;
  p.running_min = running_min.has_value() ? mutable_data_of<float>(*running_min) : nullptr;
  p.update_running_min = options.update_running_min;
  p.alpha = static_cast<Acc>(options.alpha);
  p.beta = static_cast<Acc>(options.beta);
  p.reduction = options.reduction;
  p.splits = plan.splits;
  p.split_positions = plan.split_positions;
  p.score_threads = plan.score_threads;
  p.threads_per_row = plan.threads_per_row;
  p.lanes_per_sample = lanes_for(plan.splits);
  p.ticket = ticket_slot(context.device(), context.stream());

  const int64_t blocks = scores.samples * plan.splits;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "bias_loss: too many samples: ", scores.samples);
  // From torch's caching allocator, which knows streams and captures: a static workspace would be shared by both.
  const Tensor workspace = new_tensor(out.weight, {5 * blocks + scores.samples}, out.weight.scalar_type());
  p.partial = mutable_data_of<Acc>(workspace);
  p.sample_loss = p.partial + 5 * blocks;
  p.loss = mutable_data_of<Acc>(out.loss);
  p.weight = mutable_data_of<Acc>(out.weight);
  const int64_t rows = scores.samples * scores.positions;
  const Statistics<Acc> statistics(mutable_data_of<Acc>(out.statistics), rows);
  p.row_max = statistics.row_max;
  p.row_log_sum = statistics.row_log_sum;
  p.denominator = statistics.denominator;
  const auto kernel =
      scores.positions == 1 ? bias_loss_forward_kernel<T, Acc, true> : bias_loss_forward_kernel<T, Acc, false>;
  context.launch(kernel, dim3(static_cast<unsigned>(blocks)), plan.feature_threads + plan.score_threads, p);

  if (options.reduction == Reduction::kNone && scores.positions > 1)
    context.launch(weigh_positions_kernel<Acc>,
                   dim3(static_cast<unsigned>(std::min<int64_t>((rows + 255) / 256, 65536))), 256, p.loss,
                   static_cast<const Acc*>(p.weight), rows, scores.positions);
}

// The loss of no samples, as torch has it.
void fill_empty(const Outputs& out, Reduction reduction) {
  Tensor loss = out.loss, denominator = out.statistics;
  if (reduction != Reduction::kNone)
    torch::stable::fill_(loss, reduction == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  torch::stable::fill_(denominator, reduction == Reduction::kMean ? 0.0 : 1.0);
}

}  // namespace

BiasLossResult bias_loss_cuda(std::optional<Tensor> features, std::optional<Tensor> variance,
                              std::optional<Tensor> extrema, Tensor output, Tensor target,
                              std::optional<Tensor> class_weight, std::optional<Tensor> running_min, double alpha,
                              double beta, bool update_running_min, int64_t reduction, int64_t ignore_index,
                              double label_smoothing) {
  ArgumentCheck(output).of_forward(features, variance, extrema, target, class_weight, running_min);
  const LaunchContext context(output);
  const ScalarType dtype = accumulation_dtype(output.scalar_type());
  const int64_t samples = output.size(0), positions = output.dim() == 3 ? output.size(2) : 1;
  const BatchOptions options{alpha, beta, update_running_min, static_cast<Reduction>(reduction)};
  const bool none = options.reduction == Reduction::kNone;
  const Outputs out{!none               ? new_tensor(output, {}, dtype)
                    : output.dim() == 3 ? new_tensor(output, {samples, positions}, dtype)
                                        : new_tensor(output, {samples}, dtype),
                    new_tensor(output, {samples}, dtype),
                    new_tensor(output, {count_of_statistics(samples * positions)}, dtype)};
  const BiasLossResult result{out.loss, out.weight, out.statistics};
  if (samples == 0) {
    fill_empty(out, options.reduction);
    return result;
  }
  if (features.has_value() && features->scalar_type() != output.scalar_type()) {
    // One launch for each dtype; the second takes the extrema from the variances as it would from its own.
    variance = std::get<0>(feature_variance_cuda(*features));
    features.reset();
  }
  if (features.has_value() && !samples_are_dense(*features)) features = torch::stable::contiguous(*features);
  if (variance.has_value()) variance = with_dtype(*variance, dtype);
  const Tensor readable = readable_target(target, output);
  with_types(output.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Acc = decltype(accumulator);
    const auto scores = score_batch<T, Acc>(output, readable, class_weight, {ignore_index, label_smoothing});
    launch_forward<T, Acc>(context, features, variance, extrema, scores, running_min, options, out);
  });
  return result;
}

Tensor bias_loss_backward_cuda(Tensor grad_loss, Tensor output, Tensor target, std::optional<Tensor> class_weight,
                               Tensor weight, Tensor statistics,
                               int64_t /*reduction: the denominator holds what it needs of it*/, int64_t ignore_index,
                               double label_smoothing) {
  ArgumentCheck(output).of_backward(grad_loss, target, class_weight, weight, statistics);
  const LaunchContext context(output);
  Tensor grad_output = torch::stable::empty_like(output);
  if (output.numel() == 0) return grad_output;
  const Tensor readable = readable_target(target, output);
  with_types(output.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Acc = decltype(accumulator);
    BackwardParameters<T, Acc> p{};
    p.scores = score_batch<T, Acc>(output, readable, class_weight, {ignore_index, label_smoothing});
    p.grad_output = mutable_data_of<T>(grad_output);
    p.grad_output_stride = strides_of(grad_output);
    p.grad_loss = data_of<Acc>(grad_loss);
    p.grad_loss_sample_stride = grad_loss.dim() > 0 ? grad_loss.stride(0) : 0;
    p.grad_loss_position_stride = grad_loss.dim() > 1 ? grad_loss.stride(1) : 0;
    p.weight = data_of<Acc>(weight);
    const Statistics<const Acc> passed(data_of<Acc>(statistics), p.scores.samples * p.scores.positions);
    p.row_max = passed.row_max;
    p.row_log_sum = passed.row_log_sum;
    p.denominator = passed.denominator;
    const BackwardPlan plan =
        plan_backward(p.scores.samples, p.scores.classes, p.scores.positions, p.scores.output_stride.klass == 1);
    p.threads_per_row = plan.threads_per_row;
    p.chunk = plan.chunk;
    context.launch(bias_loss_backward_kernel<T, Acc>, dim3(plan.blocks, plan.chunks), plan.threads, p);
  });
  return grad_output;
}

}  // namespace biasloss
