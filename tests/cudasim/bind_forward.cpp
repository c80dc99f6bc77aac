#include <pybind11/stl.h>

#include "bias_loss/forward.cuh"
#include "bind_scores.h"
#include "feature_variance/kernels.cuh"

namespace cudasim {

using namespace biasloss;

// features: (N, n), every sample one run
template <class T, class Acc>
FeatureBatch<T> feature_batch(const Array& features, unsigned splits) {
  const int64_t activations = features.shape(1);
  return {data_of<T>(features), stride_of(features, 0), activations, slice_length(activations, splits, sizeof(T))};
}

template <class T, class Acc>
py::tuple run_variance(const Array& features, int multiprocessors, const Schedule& schedule) {
  FeatureVarianceParameters<T, Acc> p{};
  p.samples = features.shape(0);
  p.splits = feature_splits(p.samples, features.shape(1), sizeof(T), multiprocessors);
  p.features = feature_batch<T, Acc>(features, p.splits);
  p.lanes_per_sample = lanes_for(p.splits);
  const int64_t blocks = p.samples * p.splits;
  auto partial = unwritten<Acc>({3 * blocks});
  auto variance = unwritten<Acc>({p.samples});
  auto extrema = unwritten<Acc>({2});
  p.partial = partial.mutable_data();
  p.variance = variance.mutable_data();
  p.extrema = extrema.mutable_data();
  launch(schedule, feature_variance_kernel<T, Acc>, dim3(unsigned(blocks)), dim3(kFeatureThreads), 0, p);
  return py::make_tuple(variance, extrema);
}

struct ForwardOptions {
  double alpha, beta;
  bool update_running_min;
  int reduction;
};

template <class T, class Acc>
py::dict run_forward(const std::optional<Array>& features, const std::optional<Array>& variance,
                     const std::optional<Array>& extrema, const ScoreBatch<T, Acc>& scores,
                     const std::optional<Array>& running_min, const ForwardOptions& options, int multiprocessors,
                     const Schedule& schedule) {
  ForwardParameters<T, Acc> p{};
  const ForwardPlan plan =
      plan_forward(scores.samples, scores.classes, scores.positions, scores.output_stride.klass == 1,
                   features.has_value(), features ? features->shape(1) : 0, sizeof(T), multiprocessors);
  if (features) p.features = feature_batch<T, Acc>(*features, plan.splits);
  p.variance = data_of<Acc>(variance);
  p.extrema = data_of<Acc>(extrema);
  p.scores = scores;
  p.running_min = data_of<float>(running_min);
  p.update_running_min = options.update_running_min;
  p.alpha = static_cast<Acc>(options.alpha);
  p.beta = static_cast<Acc>(options.beta);
  p.reduction = static_cast<Reduction>(options.reduction);
  p.splits = plan.splits;
  p.split_positions = plan.split_positions;
  p.score_threads = plan.score_threads;
  p.threads_per_row = plan.threads_per_row;
  p.lanes_per_sample = lanes_for(plan.splits);
  p.ticket = 1;

  const int64_t blocks = scores.samples * plan.splits, rows = scores.samples * scores.positions;
  const bool none = p.reduction == Reduction::kNone;
  auto partial = unwritten<Acc>({5 * blocks}), sample_loss = unwritten<Acc>({scores.samples});
  auto loss = unwritten<Acc>({none ? rows : 1}), weight = unwritten<Acc>({scores.samples});
  auto row_max = unwritten<Acc>({rows}), row_log_sum = unwritten<Acc>({rows}), denominator = unwritten<Acc>({1});
  p.partial = partial.mutable_data();
  p.sample_loss = sample_loss.mutable_data();
  p.loss = loss.mutable_data();
  p.weight = weight.mutable_data();
  p.row_max = row_max.mutable_data();
  p.row_log_sum = row_log_sum.mutable_data();
  p.denominator = denominator.mutable_data();
  const auto kernel =
      scores.positions == 1 ? bias_loss_forward_kernel<T, Acc, true> : bias_loss_forward_kernel<T, Acc, false>;
  launch(schedule, kernel, dim3(unsigned(blocks)), dim3(plan.feature_threads + plan.score_threads), 0, p);
  if (none && scores.positions > 1)
    launch(schedule, weigh_positions_kernel<Acc>, dim3(2), dim3(64), 0, p.loss, p.weight, rows, scores.positions);

  using namespace py::literals;
  return py::dict("loss"_a = loss, "weight"_a = weight, "row_max"_a = row_max, "row_log_sum"_a = row_log_sum,
                  "denominator"_a = denominator, "blocks"_a = blocks,
                  "threads"_a = plan.feature_threads + plan.score_threads);
}

void bind_forward(py::module_& m) {
  m.def(
      "feature_variance",
      [](const Array& features, const std::string& dtype, int multiprocessors, const Schedule& schedule) {
        return with_types(dtype, [&](auto element, auto accumulator) {
          return run_variance<decltype(element), decltype(accumulator)>(features, multiprocessors, schedule);
        });
      },
      py::arg("features"), py::kw_only(), py::arg("dtype"), py::arg("multiprocessors"),
      py::arg("schedule") = Schedule());
  m.def(
      "bias_loss",
      [](const std::optional<Array>& features, const std::optional<Array>& variance,
         const std::optional<Array>& extrema, const Array& output, const Array& target,
         const std::optional<Array>& class_weight, const std::optional<Array>& running_min, double alpha, double beta,
         bool update_running_min, int reduction, int64_t ignore_index, double label_smoothing, const std::string& dtype,
         int multiprocessors, const Schedule& schedule) {
        return with_types(dtype, [&](auto element, auto accumulator) {
          using T = decltype(element);
          using Acc = decltype(accumulator);
          const auto scores = score_batch<T, Acc>(output, target, class_weight, ignore_index, label_smoothing);
          return run_forward<T, Acc>(features, variance, extrema, scores, running_min,
                                     {alpha, beta, update_running_min, reduction}, multiprocessors, schedule);
        });
      },
      py::kw_only(), py::arg("features"), py::arg("variance"), py::arg("extrema"), py::arg("output"), py::arg("target"),
      py::arg("class_weight"), py::arg("running_min"), py::arg("alpha"), py::arg("beta"), py::arg("update_running_min"),
      py::arg("reduction"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("dtype"),
      py::arg("multiprocessors"), py::arg("schedule") = Schedule());
}

}  // namespace cudasim
