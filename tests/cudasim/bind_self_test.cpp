#include "bindings.h"
#include "self_test_kernels.h"

namespace cudasim {

void bind_self_test(py::module_& m) {
  const auto in_place = [&m](const char* name, void (*kernel)(float*)) {
    m.def(
        name,
        [kernel](py::array_t<float> x, unsigned blocks, unsigned threads, const Schedule& schedule) {
          launch(schedule, kernel, dim3(blocks), dim3(threads), threads * sizeof(float), x.mutable_data());
        },
        py::arg("x"), py::kw_only(), py::arg("blocks") = 1, py::arg("threads") = 64, py::arg("schedule") = Schedule());
  };
  in_place("rotate", rotate_kernel);
  in_place("rotate_in_warp", rotate_in_warp_kernel);
  in_place("missing_barrier", missing_barrier_kernel);
  in_place("write_race", write_race_kernel);
  in_place("uninitialized", uninitialized_kernel);
  in_place("out_of_range", out_of_range_kernel);
  in_place("deadlock", deadlock_kernel);
  in_place("divergent_barrier", divergent_barrier_kernel);
  in_place("left_lane", left_lane_kernel);
  in_place("misaligned", misaligned_kernel);
  in_place("global_out_of_range", global_out_of_range_kernel);
  in_place("deep_stack", deep_stack_kernel);
  m.def(
      "sum",
      [](py::array_t<float> x, unsigned blocks, unsigned threads, const Schedule& schedule) {
        py::array_t<float> partial = unwritten<float>({blocks});
        float out = NAN;
        launch(schedule, sum_kernel, dim3(blocks), dim3(threads), 0, x.data(), unsigned(x.size()),
               partial.mutable_data(), &out);
        return out;
      },
      py::arg("x"), py::kw_only(), py::arg("blocks"), py::arg("threads"), py::arg("schedule") = Schedule());
  m.def("float16_of", py::vectorize(float16_of));
  m.def("bfloat16_of", py::vectorize(bfloat16_of));
  m.def("float_of_float16", py::vectorize(float_of_float16));
}

}  // namespace cudasim
