// The op library of the simulated GPU: what csrc/library.cpp registers for CUDA tensors, for CPU tensors.
#include "registered_ops.h"

STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CPU, m) { BIASLOSS_CUDA_OPS(BIASLOSS_REGISTER_CUDA) }

// As csrc/build_facts.cpp has it.
extern "C" __attribute__((visibility("default"))) const char* biasloss_build_facts() {
  return "cpu_variants=baseline\ncpu_variant_in_use=baseline";
}
