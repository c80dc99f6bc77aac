"""The channel rounding of the MobileNet family."""

from __future__ import annotations


def round_channels(channels: float) -> int:
    """The multiple of 8 nearest to ``channels`` (halves round up), at least 8 and at least 90% of ``channels``.

    Source: the reference implementation of MobileNetV2 (Sandler et al., 2018), which later mobile networks follow.
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
