#include "bind_depthwise.h"
#include "depthwise/backward.cuh"

namespace cudasim {

using namespace biasloss;

struct BackwardArrays {
  const std::optional<Array>&grad, &pool_grad, &y, &y_affine, &y_coefficients;
  const Array &x, &weight;
  const std::optional<Array>&affine, &center;
  const std::optional<Array>&grad_x, &grad_weight, &sums;
};

template <class T, class Acc, int kernel, int stride>
void run_backward(const BackwardArrays& a, int y_activation, int activation, const Machine& machine) {
  const MapShape x(a.x);
  const int64_t rows = (x.rows + stride - 1) / stride, columns = (x.columns + stride - 1) / stride;
  DepthwiseBackwardParameters<T, Acc> p{};
  const DepthwisePlan plan = plan_depthwise<BackwardTiling<T, Acc, kernel, stride>>(
      x.samples, x.channels, x.rows, x.columns, rows, columns, machine.multiprocessors, machine.shared_bytes);
  if (plan.grid.tiles == 0) throw std::invalid_argument("not even one item fits");
  p.grid = plan.grid;
  p.grad = data_of<T>(a.grad);
  p.pool_grad = data_of<Acc>(a.pool_grad);
  p.pool_share = Acc(1) / Acc(rows * columns);
  p.y = data_of<T>(a.y);
  p.y_affine = data_of<Acc>(a.y_affine);
  p.y_coefficients = data_of<Acc>(a.y_coefficients);
  p.y_gate = gate_of<Acc>(static_cast<Activation>(y_activation));
  p.x = data_of<T>(a.x);
  p.weight = data_of<Acc>(a.weight);
  p.affine = data_of<Acc>(a.affine);
  p.center = data_of<Acc>(a.center);
  p.gate = gate_of<Acc>(static_cast<Activation>(activation));
  p.grad_x = data_of<T>(a.grad_x);
  p.grid.vectors = vectors_possible<T>(x.channels, {p.grad, p.y, p.x, p.grad_x});
  const int64_t blocks = plan.blocks_of_slab;
  const unsigned taps = kernel * kernel;
  auto partial = unwritten<Acc>({blocks * (taps + 2) * x.channels});
  p.partial = partial.mutable_data();
  launch(machine.schedule, depthwise_backward_kernel<T, Acc, kernel, stride>, dim3(plan.slabs, plan.blocks_of_slab),
         dim3(kDepthwiseThreads), plan.shared_bytes, p);
  const unsigned length = (taps + 2) * unsigned(x.channels);
  launch(machine.schedule, depthwise_sums_kernel<Acc>, dim3((length + 31) / 32), dim3(kFinishThreads), 0, p.partial,
         blocks, p.grid.channels, taps, data_of<Acc>(a.grad_weight), data_of<Acc>(a.sums));
}

void bind_depthwise_backward(py::module_& m) {
  using Optional = std::optional<Array>;
  m.def(
      "depthwise_backward",
      [](const Optional& grad, const Optional& pool_grad, const Optional& y, const Optional& y_affine,
         const Optional& y_coefficients, int y_activation, const Array& x, const Array& weight, const Optional& affine,
         const Optional& center, int activation, int stride, const Optional& grad_x, const Optional& grad_weight,
         const Optional& sums, const std::string& dtype, const Machine& machine) {
        const BackwardArrays arrays = {grad,   pool_grad, y,      y_affine, y_coefficients, x,
                                       weight, affine,    center, grad_x,   grad_weight,    sums};
        with_types(dtype, [&](auto element, auto accumulator) {
          with_kernel_and_stride(int(weight.shape(1)), stride, [&](auto k, auto s) {
            run_backward<decltype(element), decltype(accumulator), k(), s()>(arrays, y_activation, activation, machine);
          });
        });
      },
      py::kw_only(), py::arg("grad"), py::arg("pool_grad"), py::arg("y"), py::arg("y_affine"),
      py::arg("y_coefficients"), py::arg("y_activation"), py::arg("x"), py::arg("weight"), py::arg("affine"),
      py::arg("center"), py::arg("activation"), py::arg("stride"), py::arg("grad_x"), py::arg("grad_weight"),
      py::arg("sums"), py::arg("dtype"), py::arg("machine"));
}

}  // namespace cudasim
