"""The ops: declarations, reference implementations, kernels and the choice between them."""

# Importing an op declares it: whatever asks for the ops finds all of them.
from biasloss_ext.ops.batch_norm import op as _batch_norm
from biasloss_ext.ops.bias_loss import op as _bias_loss
from biasloss_ext.ops.depthwise import op as _depthwise
from biasloss_ext.ops.expand_depthwise import op as _expand_depthwise
from biasloss_ext.ops.feature_variance import op as _feature_variance
from biasloss_ext.ops.pointwise import op as _pointwise
from biasloss_ext.ops.pool_variance import op as _pool_variance
from biasloss_ext.ops.squeeze_excite import op as _squeeze_excite

__all__: list[str] = []
