"""Everything that can be measured, by name. A new op adds its module here and its shapes in `shapes`."""

from __future__ import annotations

from biasloss_ext.benchmarks import bias_loss, depthwise, feature_variance, skipblocknet
from biasloss_ext.benchmarks.contender import Op

OPS: dict[str, Op] = {op.name: op for op in (feature_variance.OP, bias_loss.OP, depthwise.OP, skipblocknet.OP)}
