// biasloss_ext._C: what was built, and what this CPU has. No torch in it, so that it loads beside any torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "simd/isa.h"

#if !defined(BIASLOSS_CUDA_ARCHITECTURES)
#define BIASLOSS_CUDA_ARCHITECTURES ""
#endif

namespace {

std::map<std::string, std::string> build_information() {
  return {{"version", BIASLOSS_VERSION},
          {"torch", BIASLOSS_BUILT_WITH_TORCH},
          {"compiler", BIASLOSS_COMPILER},
          {"cuda", BIASLOSS_CUDA_VERSION},
          {"cuda_architectures", BIASLOSS_CUDA_ARCHITECTURES},
          {"cpu_variants", BIASLOSS_CPU_VARIANTS},
          {"cpu_variant_in_use", biasloss::isa_name(biasloss::best_isa())},
          {"cpu_int8", biasloss::has_int8() ? "AVX-512 VNNI" : ""}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU features of biasloss_ext.";
  m.def("build_information", &build_information, "What this package was built with, and which CPU kernels run here.");
}
