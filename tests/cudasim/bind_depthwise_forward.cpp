#include "bind_depthwise.h"
#include "depthwise/forward.cuh"

namespace cudasim {

using namespace biasloss;

struct ForwardArrays {
  const Array &x, &weight;
  const std::optional<Array>& affine;
  const Array& y;
  const std::optional<Array>& moments;
};

template <class T, class Acc, int kernel, int stride>
void run_forward(const ForwardArrays& a, int activation, const Machine& machine) {
  const MapShape x(a.x), y(a.y);
  DepthwiseForwardParameters<T, Acc> p{};
  const DepthwisePlan plan = plan_depthwise<ForwardTiling<T, Acc, kernel, stride>>(
      x.samples, x.channels, y.rows, y.columns, x.rows, x.columns, machine.multiprocessors, machine.shared_bytes);
  if (plan.grid.tiles == 0) throw std::invalid_argument("not even one item fits");
  p.grid = plan.grid;
  p.x = data_of<T>(a.x);
  p.weight = data_of<Acc>(a.weight);
  p.affine = data_of<Acc>(a.affine);
  p.gate = gate_of<Acc>(static_cast<Activation>(activation));
  p.y = data_of<T>(a.y);
  p.grid.vectors = vectors_possible<T>(x.channels, {p.x, p.y});
  const int64_t blocks = plan.blocks_of_slab;
  auto partial = unwritten<Acc>({3 * blocks * x.channels});
  if (a.moments) p.partial = partial.mutable_data();
  launch(machine.schedule, depthwise_forward_kernel<T, Acc, kernel, stride>, dim3(plan.slabs, plan.blocks_of_slab),
         dim3(kDepthwiseThreads), plan.shared_bytes, p);
  if (a.moments)
    launch(machine.schedule, depthwise_moments_kernel<Acc>, dim3(unsigned(x.channels + 31) / 32), dim3(kFinishThreads),
           0, p.partial, blocks, p.grid.channels, data_of<Acc>(a.moments));
}

void bind_depthwise_forward(py::module_& m) {
  py::class_<Machine>(m, "Machine")
      .def(py::init([](int multiprocessors, int64_t shared_bytes, const Schedule& schedule) {
             return Machine{multiprocessors, shared_bytes, schedule};
           }),
           py::kw_only(), py::arg("multiprocessors") = 2, py::arg("shared_bytes") = plan::kSharedBytes,
           py::arg("schedule") = Schedule());
  m.def(
      "depthwise",
      [](const Array& x, const Array& weight, const std::optional<Array>& affine, int activation, int stride,
         const Array& y, const std::optional<Array>& moments, const std::string& dtype, const Machine& machine) {
        with_types(dtype, [&](auto element, auto accumulator) {
          with_kernel_and_stride(int(weight.shape(1)), stride, [&](auto k, auto s) {
            run_forward<decltype(element), decltype(accumulator), k(), s()>({x, weight, affine, y, moments}, activation,
                                                                            machine);
          });
        });
      },
      py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("affine"), py::arg("activation"), py::arg("stride"),
      py::arg("y"), py::arg("moments"), py::arg("dtype"), py::arg("machine"));
}

}  // namespace cudasim
