// What was built, and what this CPU has. A C function of _ops.so, read by biasloss_ext/ops/native.py: it needs no
// headers of Python, so that one library serves every Python.
#include <exception>
#include <string>

#include "simd/isa.h"

namespace {

std::string of_this_cpu() {
  try {
    return std::string("cpu_variant_in_use=") + biasloss::isa_name(biasloss::best_isa()) +
           "\ncpu_int8=" + biasloss::int8_isa_name(biasloss::best_int8_isa());
  } catch (const std::exception& error) {
    return std::string("invalid=") + error.what();  // BIASLOSS_CPU_ISA; C functions do not throw
  }
}

}  // namespace

// Lines of name=value. A line named "invalid" holds what is wrong with the environment.
extern "C" __attribute__((visibility("default"))) const char* biasloss_build_facts() {
  static const std::string facts = "version=" BIASLOSS_VERSION "\ntorch=" BIASLOSS_BUILT_WITH_TORCH
                                   "\ncompiler=" BIASLOSS_COMPILER "\ncuda=" BIASLOSS_CUDA_VERSION
                                   "\ncuda_architectures=" BIASLOSS_CUDA_ARCHITECTURES
                                   "\ncpu_variants=" BIASLOSS_CPU_VARIANTS "\n" +
                                   of_this_cpu();
  return facts.c_str();
}
