"""The inverted residual block of MobileNetV3 (Howard et al., 2019)."""

from __future__ import annotations

from torch import Tensor, nn

from biasloss_ext.nn.conv_norm import conv_norm
from biasloss_ext.nn.squeeze_excite import SqueezeExcite


class InvertedResidual(nn.Module):
    """1x1 expand, depthwise k x k, optional squeeze-and-excitation, 1x1 project; plus the input if the shapes agree.

    A batch normalization follows each convolution, and an activation follows the first two. The expand step exists even if the
    expansion is 1, as in the SkipblockNet checkpoints.

    Input: (N, in_channels, H, W). Output: (N, out_channels, ceil(H / stride), ceil(W / stride)). Any floating dtype; contiguous
    or channels_last, which is kept.

    Args:
        in_channels: channels of the input.
        hidden_channels: channels of the expanded map.
        out_channels: channels of the output.
        kernel_size: kernel size of the depthwise convolution, odd.
        stride: stride of the depthwise convolution.
        squeeze_excite: whether to gate the expanded channels before the projection.
        activation: class of the activation, `nn.ReLU` or `nn.Hardswish`.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        squeeze_excite: bool = False,
        activation: type[nn.Module] = nn.Hardswish,
    ) -> None:
        super().__init__()
        # Names and positions are the checkpoint's: `conv.6` exists without parameters if nothing is gated.
        self.conv = nn.Sequential(
            *conv_norm(in_channels, hidden_channels),  # expand
            activation(),
            *conv_norm(hidden_channels, hidden_channels, kernel_size, stride, groups=hidden_channels),  # depthwise
            activation(),
            SqueezeExcite(hidden_channels) if squeeze_excite else nn.Identity(),
            *conv_norm(hidden_channels, out_channels),  # project
        )
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.has_residual else y
