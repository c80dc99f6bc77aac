"""Squeeze-and-excitation (Hu et al., 2018) with the hard-sigmoid gate of MobileNetV3."""

from __future__ import annotations

from torch import Tensor, nn

from biasloss_ext.nn.channels import round_channels


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in [0, 1], computed from the means of all channels.

    Input and output: (N, channels, H, W), any floating dtype; contiguous or channels_last, which is kept.

    Args:
        channels: channels of the map.
        reduction: the hidden layer has ``round_channels(channels // reduction)`` units.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = round_channels(channels // reduction)
        self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.fc(x.mean((2, 3)))
        return x * gate[:, :, None, None]
