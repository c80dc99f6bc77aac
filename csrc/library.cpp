// What _ops.so registers: one line an op and device. The schemas are defined in Python, in biasloss_ext/ops/<op>/op.py.
#include <torch/csrc/stable/library.h>

#include "batch_norm/ops.h"
#include "bias_loss/ops.h"
#include "channel_gram/ops.h"
#include "depthwise/ops.h"
#include "expand_depthwise/ops.h"
#include "feature_variance/ops.h"
#include "pointwise/ops.h"
#include "pool_variance/ops.h"
#include "squeeze_excite/ops.h"

STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CPU, m) {
  m.impl("batch_norm_affine", TORCH_BOX(&biasloss::batch_norm_affine_cpu));
  m.impl("batch_norm_apply", TORCH_BOX(&biasloss::batch_norm_apply_cpu));
  m.impl("batch_norm_backward", TORCH_BOX(&biasloss::batch_norm_backward_cpu));
  m.impl("batch_norm_coefficients", TORCH_BOX(&biasloss::batch_norm_coefficients_cpu));
  m.impl("batch_norm_statistics", TORCH_BOX(&biasloss::batch_norm_statistics_cpu));
  m.impl("bias_loss", TORCH_BOX(&biasloss::bias_loss_cpu));
  m.impl("bias_loss_backward", TORCH_BOX(&biasloss::bias_loss_backward_cpu));
  m.impl("channel_gram", TORCH_BOX(&biasloss::channel_gram_cpu));
  m.impl("depthwise", TORCH_BOX(&biasloss::depthwise_cpu));
  m.impl("depthwise_backward", TORCH_BOX(&biasloss::depthwise_backward_cpu));
  m.impl("expand_depthwise", TORCH_BOX(&biasloss::expand_depthwise_cpu));
  m.impl("expand_depthwise_activate", TORCH_BOX(&biasloss::expand_depthwise_activate_cpu));
  m.impl("expand_depthwise_backward", TORCH_BOX(&biasloss::expand_depthwise_backward_cpu));
  m.impl("feature_variance", TORCH_BOX(&biasloss::feature_variance_cpu));
  m.impl("pointwise", TORCH_BOX(&biasloss::pointwise_cpu));
  m.impl("pointwise_backward", TORCH_BOX(&biasloss::pointwise_backward_cpu));
  m.impl("pool_variance", TORCH_BOX(&biasloss::pool_variance_cpu));
  m.impl("pool_variance_backward", TORCH_BOX(&biasloss::pool_variance_backward_cpu));
  m.impl("squeeze_excite", TORCH_BOX(&biasloss::squeeze_excite_cpu));
  m.impl("squeeze_excite_backward", TORCH_BOX(&biasloss::squeeze_excite_backward_cpu));
}

#if defined(BIASLOSS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(biasloss_ext, CUDA, m) {
  m.impl("bias_loss", TORCH_BOX(&biasloss::bias_loss_cuda));
  m.impl("bias_loss_backward", TORCH_BOX(&biasloss::bias_loss_backward_cuda));
  m.impl("depthwise", TORCH_BOX(&biasloss::depthwise_cuda));
  m.impl("depthwise_backward", TORCH_BOX(&biasloss::depthwise_backward_cuda));
  m.impl("feature_variance", TORCH_BOX(&biasloss::feature_variance_cuda));
}
#endif
