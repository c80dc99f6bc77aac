"""The skip block of SkipblockNet (Abrahamyan et al., Bias Loss for Mobile Neural Networks, ICCV 2021)."""

from __future__ import annotations

from torch import Tensor, nn

from biasloss_ext.nn.conv_norm import conv_norm
from biasloss_ext.nn.pooling import average_to


class SkipBlock(nn.Module):
    """Adds an early, large map to a later, smaller one: average pool, 1x1 expand, depthwise k x k, 1x1 project.

    A batch normalization follows each convolution, and a ReLU follows the first two.

    Inputs: the early map (N, in_channels, H, W) and the later one (N, out_channels, h, w). The early map is averaged to the size
    of the later one. Output: their sum, (N, out_channels, h, w). Any floating dtype; contiguous or channels_last, which is kept.

    Args:
        in_channels: channels of the early map.
        hidden_channels: channels of the expanded map.
        out_channels: channels of the later map.
        kernel_size: kernel size of the depthwise convolution, odd.
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.core_block = nn.Sequential(
            *conv_norm(in_channels, hidden_channels),  # expand
            nn.ReLU(),
            *conv_norm(hidden_channels, hidden_channels, kernel_size, groups=hidden_channels),  # depthwise
            nn.ReLU(),
            *conv_norm(hidden_channels, out_channels),  # project
        )

    def forward(self, early: Tensor, later: Tensor) -> Tensor:
        pooled = average_to(early, (later.shape[-2], later.shape[-1]))
        carried: Tensor = self.core_block(pooled)
        return later + carried
