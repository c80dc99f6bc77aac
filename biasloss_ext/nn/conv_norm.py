"""Convolution without bias, then batch normalization: the pair that all layers here consist of."""

from __future__ import annotations

from torch import nn


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """The two modules, to unpack into a `Sequential`. The padding keeps the size of the map at stride 1."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels)
