"""Everything that can be measured, by name. A new op adds its module here and its shapes in `shapes`."""

from __future__ import annotations

from biasloss_ext.benchmarks import (
    batch_norm,
    bias_loss,
    depthwise,
    expand_depthwise,
    feature_variance,
    pointwise,
    pool_variance,
    skipblocknet,
    squeeze_excite,
)
from biasloss_ext.benchmarks.contender import Op

_MODULES = (
    feature_variance,
    bias_loss,
    depthwise,
    pointwise,
    expand_depthwise,
    squeeze_excite,
    pool_variance,
    batch_norm,
    skipblocknet,
)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
