"""Layers of the mobile networks, in plain PyTorch.

Each layer holds its parameters in ordinary `torch.nn` modules under the names of the SkipblockNet authors'
checkpoints. A faster forward pass may therefore replace the plain one in a subclass: parameters, state-dict keys and
checkpoints stay as they are.
"""

from biasloss_ext.nn.channels import round_channels
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d
from biasloss_ext.nn.head import ClassificationHead
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.nn.skip_block import SkipBlock
from biasloss_ext.nn.squeeze_excite import SqueezeExcite

__all__ = ["ClassificationHead", "DepthwiseConv2d", "InvertedResidual", "SkipBlock", "SqueezeExcite", "round_channels"]
