#include <pybind11/stl.h>

#include "bias_loss/backward.cuh"
#include "bind_scores.h"

namespace cudasim {

using namespace biasloss;

void bind_backward(py::module_& m) {
  m.def(
      "bias_loss_backward",
      [](const Array& grad_loss, const Array& output, const Array& target, const std::optional<Array>& class_weight,
         const Array& weight, const Array& row_max, const Array& row_log_sum, const Array& denominator,
         const Array& grad_output, int64_t ignore_index, double label_smoothing, const std::string& dtype,
         const Schedule& schedule) {
        with_types(dtype, [&](auto element, auto accumulator) {
          using T = decltype(element);
          using Acc = decltype(accumulator);
          BackwardParameters<T, Acc> p{};
          p.scores = score_batch<T, Acc>(output, target, class_weight, ignore_index, label_smoothing);
          p.grad_output = data_of<T>(grad_output);
          p.grad_output_stride = {stride_of(grad_output, 0), stride_of(grad_output, 1), stride_of(grad_output, 2)};
          p.grad_loss = data_of<Acc>(grad_loss);
          p.grad_loss_sample_stride = stride_of(grad_loss, 0);
          p.grad_loss_position_stride = stride_of(grad_loss, 1);
          p.weight = data_of<Acc>(weight);
          p.row_max = data_of<Acc>(row_max);
          p.row_log_sum = data_of<Acc>(row_log_sum);
          p.denominator = data_of<Acc>(denominator);
          const BackwardPlan plan =
              plan_backward(p.scores.samples, p.scores.classes, p.scores.positions, p.scores.output_stride.klass == 1);
          p.threads_per_row = plan.threads_per_row;
          p.chunk = plan.chunk;
          launch(schedule, bias_loss_backward_kernel<T, Acc>, dim3(plan.blocks, plan.chunks), dim3(plan.threads), 0, p);
        });
      },
      py::kw_only(), py::arg("grad_loss"), py::arg("output"), py::arg("target"), py::arg("class_weight"),
      py::arg("weight"), py::arg("row_max"), py::arg("row_log_sum"), py::arg("denominator"), py::arg("grad_output"),
      py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("dtype"), py::arg("schedule") = Schedule());
}

}  // namespace cudasim
