// The op library of the simulated GPU: what csrc/library.cpp registers for CUDA tensors, for CPU tensors.
#include "registered_ops.h"

STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CPU, m) { BIASLOSS_CUDA_OPS(BIASLOSS_REGISTER_CUDA) }
