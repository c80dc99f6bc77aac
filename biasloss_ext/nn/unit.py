"""The modules of a network that are computed as a whole: blocks, and sequences of convolution, normalization, activation."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn.depthwise_conv import is_depthwise
from biasloss_ext.nn.recognize import is_frozen_norm

# A module with more convolutions is a stage or a network. Hooks on the inside of code that is traced as a whole do not run.
MOST_CONVOLUTIONS = 12
MOST_IN_SEQUENCE = 5  # expansion, depthwise, projection and the two of an attention


def is_unit(module: nn.Module) -> bool:
    """Whether the module, judged by its layers, is a block or one convolution with its normalization and activation."""
    if not module._modules or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    if not 0 < len(convolutions) <= MOST_CONVOLUTIONS:
        return False
    if not any(isinstance(layer, _BatchNorm) or is_frozen_norm(layer) for layer in module.modules()):
        return False
    depthwise = sum(map(is_depthwise, convolutions))
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return _is_unit_sequence(module, len(convolutions), depthwise)
    return depthwise > 0 or len(convolutions) == 1 or all(c.kernel_size == (1, 1) for c in convolutions)


def _is_unit_sequence(module: nn.Sequential, convolutions: int, depthwise: int) -> bool:
    """A sequence of blocks is not a unit."""
    if len(module) == 1 or convolutions > MOST_IN_SEQUENCE:
        return False
    if any(not isinstance(child, nn.Sequential) and is_unit(child) for child in module.children()):
        return False
    return depthwise in (1, 2) or convolutions == 1
