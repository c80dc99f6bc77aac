"""Layers of the mobile networks: in plain PyTorch, and on the fused ops.

Each layer keeps its parameters in ordinary `torch.nn` modules, under the names of the SkipblockNet authors' checkpoints. A fused
layer is a subclass of the plain one with another forward pass; parameters, state_dict keys and checkpoints are the same.
"""

from biasloss_ext.nn.channels import round_channels
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d
from biasloss_ext.nn.fused_conv_norm import FusedConvNormActivation, FusedHead
from biasloss_ext.nn.fused_inverted_residual import FusedInvertedResidual, FusedSkipBlock
from biasloss_ext.nn.head import ClassificationHead
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.nn.skip_block import SkipBlock
from biasloss_ext.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "ClassificationHead",
    "DepthwiseConv2d",
    "FusedConvNormActivation",
    "FusedHead",
    "FusedInvertedResidual",
    "FusedSkipBlock",
    "InvertedResidual",
    "SkipBlock",
    "SqueezeExcite",
    "round_channels",
]
