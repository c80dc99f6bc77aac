#include <pybind11/stl.h>

#include "bindings.h"

PYBIND11_MODULE(biasloss_cudasim, m) {
  using namespace cudasim;
  py::register_exception<Violation>(m, "Violation", PyExc_RuntimeError);
  py::class_<Schedule>(m, "Schedule")
      .def(py::init([](unsigned seed, unsigned resident_blocks, const std::string& skipped_barrier) {
             return Schedule{seed, resident_blocks, skipped_barrier};
           }),
           py::kw_only(), py::arg("seed") = 0, py::arg("resident_blocks") = 2, py::arg("skipped_barrier") = "");
  m.def("take_barriers_met", [] { return scheduler().take_barriers_met(); });
  bind_self_test(m);
}
