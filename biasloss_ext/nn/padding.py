"""Convolutions that pad as TensorFlow does, found by running them on numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PLAIN = nn.Conv2d(1, 1, 1).__dict__.keys()
_padding: dict[tuple[Any, ...], bool] = {}


def pads_same(conv: nn.Module) -> bool:
    """Whether a subclass of nn.Conv2d with its own forward pads with zeros to ``ceil(size / stride)`` outputs, as timm's
    Conv2dSame does. If the number of zero rows or columns is odd, the extra one comes after the map.

    A copy with two channels is run on even and odd sizes.
    """
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is nn.Conv2d.forward or conv.dilation != (1, 1):
        return False
    if conv._modules or conv.__dict__.keys() - _PLAIN:
        return False
    key = (type(conv), conv.kernel_size, conv.stride, str(conv.padding), conv.padding_mode)
    if key not in _padding:
        _padding[key] = _agrees(conv)
    return _padding[key]


def _agrees(conv: nn.Conv2d) -> bool:
    twin = copy.copy(conv)
    weight = torch.linspace(-1.0, 1.0, 2 * conv.kernel_size[0] * conv.kernel_size[1]).reshape(2, 1, *conv.kernel_size)
    twin._parameters = {"weight": nn.Parameter(weight), "bias": None}  # type: ignore[assignment]
    twin.__dict__.update(in_channels=2, out_channels=2, groups=2)
    try:
        with torch.no_grad():
            return all(
                torch.allclose(type(conv).forward(twin, x), _convolved_same(x, weight, conv.stride), atol=1e-5)
                for x in (torch.linspace(-2.0, 2.0, 2 * h * w).reshape(1, 2, h, w) for h, w in ((8, 9), (11, 10)))
            )
    except Exception:  # whatever its own code raises for a copy of other channels
        return False


def _convolved_same(x: Tensor, weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The depthwise convolution with TensorFlow's "same" padding, for any kernel and stride."""
    padding: list[int] = []
    for size, kernel, step in zip(x.shape[:1:-1], weight.shape[:1:-1], reversed(stride), strict=True):
        total = max((-(-size // step) - 1) * step + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, padding), weight, None, stride, groups=len(weight))
