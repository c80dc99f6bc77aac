#include "finish.h"

#include <cmath>

#include "../cpu/maps.h"

namespace biasloss {
namespace {

template <class T>
T* mutable_values_of(const OptionalTensor& t, int64_t count, const char* name) {
  if (!t.has_value()) return nullptr;
  values_of<T>(*t, count, name);  // checks it
  return static_cast<T*>(t->mutable_data_ptr());
}

// As torch's lerp, computed in float64 and rounded once.
template <class T>
void move_towards(T* running, const T* values, double factor, int64_t channels, double momentum) {
  if (running == nullptr) return;
  for (int64_t c = 0; c < channels; ++c) {
    const double from = double(running[c]), to = factor * double(values[c]), way = to - from;
    running[c] = static_cast<T>(momentum < 0.5 ? from + momentum * way : to - (1 - momentum) * way);
  }
}

void count_batch(const OptionalTensor& num_batches_tracked) {
  if (!num_batches_tracked.has_value()) return;
  const Tensor& t = *num_batches_tracked;
  STD_TORCH_CHECK(t.numel() == 1, "num_batches_tracked: expected one value, got ", t.numel());
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, "num_batches_tracked: expected an int64 value");
  ++*static_cast<int64_t*>(t.mutable_data_ptr());
}

template <class T>
void finish(T* statistics, int64_t channels, int64_t count, const NormArguments& norm) {
  const T* weight = values_of<T>(norm.weight, channels, "norm_weight");
  const T* bias = values_of<T>(norm.bias, channels, "norm_bias");
  T* running_mean = mutable_values_of<T>(norm.running_mean, channels, "running_mean");
  T* running_var = mutable_values_of<T>(norm.running_var, channels, "running_var");
  count_batch(norm.num_batches_tracked);
  const T *mean = statistics, *var = mean + channels;
  T *scale = statistics + 2 * channels, *shift = scale + channels;
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = static_cast<T>((weight == nullptr ? 1.0 : double(weight[c])) / std::sqrt(double(var[c]) + norm.eps));
    // Of the rounded scale: at the mean, the bias is what remains.
    shift[c] = static_cast<T>((bias == nullptr ? 0.0 : double(bias[c])) - double(scale[c]) * double(mean[c]));
  }
  if (count == 0) return;
  const double n = static_cast<double>(count);
  move_towards(running_mean, mean, 1.0, channels, norm.momentum);
  move_towards(running_var, var, n / (n - 1), channels, norm.momentum);
}

template <class T>
void finish(T* coefficients, int64_t channels, int64_t count, const NormGradientArguments& norm) {
  const T* scale = values_of<T>(norm.affine, 2 * channels, "affine");
  const T* mean = values_of<T>(norm.moments, 2 * channels, "moments");
  const T* var = mean + channels;
  const auto row = [&](int64_t i) { return coefficients + i * channels; };
  T *a = row(0), *b = row(1), *k = row(2), *center = row(3), *of_weight = row(4), *of_bias = row(5);
  const bool constant = norm.frozen || count == 0;  // also where the sums are not finite
  for (int64_t c = 0; c < channels; ++c) {
    const double du = double(of_weight[c]), du_centered = double(of_bias[c]);
    const double factor = double(scale[c]) / double(count), variance = double(var[c]) + norm.eps;
    a[c] = scale[c];
    b[c] = static_cast<T>(constant ? 0.0 : -factor * du_centered / variance);
    k[c] = static_cast<T>(constant ? 0.0 : -factor * du);
    center[c] = mean[c];
    of_weight[c] = static_cast<T>(du_centered / std::sqrt(variance));
    of_bias[c] = static_cast<T>(du);
  }
}

template <class Norm>
void finish_rows(const Tensor& rows, int64_t count, const Norm& norm) {
  const int64_t channels = rows.size(1);
  rows.scalar_type() == ScalarType::Double
      ? finish(static_cast<double*>(rows.mutable_data_ptr()), channels, count, norm)
      : finish(static_cast<float*>(rows.mutable_data_ptr()), channels, count, norm);
}

}  // namespace

void finish_statistics(const Tensor& statistics, int64_t count, const NormArguments& norm) {
  finish_rows(statistics, count, norm);
}

void finish_coefficients(const Tensor& coefficients, int64_t count, const NormGradientArguments& norm) {
  finish_rows(coefficients, count, norm);
}

}  // namespace biasloss
