#pragma once

#include "bias_loss/parameters.h"
#include "bindings.h"

namespace cudasim {

// output: (N, K) or (N, K, S); target: class indices (N) or (N, S), or probabilities of the scores' shape and type
template <class T, class Acc>
biasloss::ScoreBatch<T, Acc> score_batch(const Array& output, const Array& target,
                                         const std::optional<Array>& class_weight, int64_t ignore_index,
                                         double label_smoothing) {
  using biasloss::TargetKind;
  biasloss::ScoreBatch<T, Acc> b{};
  b.output = data_of<T>(output);
  b.output_stride = {stride_of(output, 0), stride_of(output, 1), stride_of(output, 2)};
  b.target = target.data();
  const bool integer = target.ndim() < output.ndim();
  b.target_kind = !integer                 ? TargetKind::kProbability
                  : target.itemsize() == 8 ? TargetKind::kInt64
                  : target.itemsize() == 4 ? TargetKind::kInt32
                                           : TargetKind::kUInt8;
  if (!integer) b.target_stride = {stride_of(target, 0), stride_of(target, 1), stride_of(target, 2)};
  b.class_weight = data_of<Acc>(class_weight);
  b.samples = output.shape(0);
  b.classes = unsigned(output.shape(1));
  b.positions = output.ndim() == 3 ? output.shape(2) : 1;
  b.ignore_index = ignore_index;
  b.label_smoothing = static_cast<Acc>(label_smoothing);
  return b;
}

}  // namespace cudasim
