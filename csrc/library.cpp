// What _ops.so registers: one line an op and device. The schemas are defined in Python, in biasloss_ext/ops/<op>/op.py.
#include <torch/csrc/stable/library.h>

#include "bias_loss/ops.h"
#include "depthwise/ops.h"
#include "feature_variance/ops.h"

STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CPU, m) {
  m.impl("feature_variance", TORCH_BOX(&biasloss::feature_variance_cpu));
  m.impl("bias_loss", TORCH_BOX(&biasloss::bias_loss_cpu));
  m.impl("bias_loss_backward", TORCH_BOX(&biasloss::bias_loss_backward_cpu));
}

#if defined(BIASLOSS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CUDA, m) {
  m.impl("feature_variance", TORCH_BOX(&biasloss::feature_variance_cuda));
  m.impl("bias_loss", TORCH_BOX(&biasloss::bias_loss_cuda));
  m.impl("bias_loss_backward", TORCH_BOX(&biasloss::bias_loss_backward_cuda));
  m.impl("depthwise", TORCH_BOX(&biasloss::depthwise_cuda));
  m.impl("depthwise_backward", TORCH_BOX(&biasloss::depthwise_backward_cuda));
}
#endif
