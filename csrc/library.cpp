// What _ops.so registers.
#include "registered_ops.h"

STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CPU, m){BIASLOSS_CPU_OPS(BIASLOSS_REGISTER_CPU)}
#if defined(BIASLOSS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CUDA, m) {
  BIASLOSS_CUDA_OPS(BIASLOSS_REGISTER_CUDA)
}
#endif
