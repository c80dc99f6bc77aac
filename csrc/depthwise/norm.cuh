// The last step of a batch normalization's statistics, and of its gradient, for one channel. As in
// ../batch_norm/finish.cpp: computed in double and rounded once.
#pragma once

#include <cmath>
#include <cstdint>

#include "../cuda/portable.cuh"
#include "../math/moments.h"

namespace biasloss {

// Of the normalization that follows a map. The first five pointers may be null, for what the comments say.
template <class Acc>
struct NormParameters {
  const Acc *weight, *bias;         // (C): ones, zeros
  Acc *running_mean, *running_var;  // (C): not tracked
  int64_t* num_batches_tracked;     // not counted
  double momentum, eps;
  double count;     // of the map's values in a channel
  Acc* statistics;  // (4, C)
};

// Of the normalization before a map.
template <class Acc>
struct NormGradientParameters {
  const Acc *scale, *mean, *var;  // (C)
  double eps;
  double count;
  bool constant;      // the moments pass no gradient on
  Acc* coefficients;  // (6, C); null: no normalization
};

// As torch's lerp.
template <class Acc>
__device__ __forceinline__ void move_towards(Acc* running, double value, double momentum) {
  const double from = static_cast<double>(*running), way = value - from;
  *running = static_cast<Acc>(momentum < 0.5 ? from + momentum * way : value - (1 - momentum) * way);
}

template <class Acc>
__device__ __forceinline__ void finish_channel(const NormParameters<Acc>& norm, unsigned channel, unsigned channels,
                                               const Moments<Acc>& moments) {
  const bool empty = norm.count == 0;
  const double exact_var = empty ? 0.0 : static_cast<double>(moments.m2) / norm.count;
  const Acc mean = moments.mean, var = static_cast<Acc>(exact_var);
  const double weight = norm.weight == nullptr ? 1.0 : static_cast<double>(norm.weight[channel]);
  const double bias = norm.bias == nullptr ? 0.0 : static_cast<double>(norm.bias[channel]);
  const Acc scale = static_cast<Acc>(weight / std::sqrt(static_cast<double>(var) + norm.eps));
  Acc* const statistics = norm.statistics + channel;
  statistics[0] = mean;
  statistics[channels] = var;
  statistics[2 * channels] = scale;
  // Of the rounded scale: at the mean, the bias is what remains.
  statistics[3 * channels] = static_cast<Acc>(bias - static_cast<double>(scale) * static_cast<double>(mean));
  if (empty) return;
  if (norm.running_mean != nullptr) move_towards(norm.running_mean + channel, static_cast<double>(mean), norm.momentum);
  if (norm.running_var != nullptr)
    move_towards(norm.running_var + channel, static_cast<double>(var) * (norm.count / (norm.count - 1)), norm.momentum);
}

// From sum(du) and sum(du * (y - mean)).
template <class Acc>
__device__ __forceinline__ void finish_channel(const NormGradientParameters<Acc>& norm, unsigned channel,
                                               unsigned channels, Acc gradient, Acc product) {
  const double scale = static_cast<double>(norm.scale[channel]);
  const double variance = static_cast<double>(norm.var[channel]) + norm.eps, factor = scale / norm.count;
  const double du = static_cast<double>(gradient), du_centered = static_cast<double>(product);
  Acc* const coefficients = norm.coefficients + channel;
  coefficients[0] = norm.scale[channel];
  coefficients[channels] = norm.constant ? Acc(0) : static_cast<Acc>(-factor * du_centered / variance);
  coefficients[2 * channels] = norm.constant ? Acc(0) : static_cast<Acc>(-factor * du);
  coefficients[3 * channels] = norm.mean[channel];
  coefficients[4 * channels] = static_cast<Acc>(du_centered / std::sqrt(variance));
  coefficients[5 * channels] = gradient;
}

}  // namespace biasloss
