"""What the ops on feature maps (N, C, H, W) have in common: layout, activations, channel sums, in plain PyTorch.

The terms that the ops of a depthwise-separable block share, here and in csrc:

affine (2, C): rows scale and shift of a batch normalisation; it maps x to ``u = scale * x + shift``, and an activation
    maps u to h. Both are applied while x is loaded; h is never stored.
moments (2, C): rows mean and biased variance of a map over N, H and W, taken from the values as they are stored.
coefficients (4, C): rows a, b, c and center of the backward pass of a batch normalisation; from du, the gradient at u, and
    the map y it comes from, ``dy = a * du + b * (y - center) + c``. See :func:`biasloss_ext.nn.batch_norm.coefficients`.
sums (2, C): rows ``sum(du)`` and ``sum(du * (y - center))`` over N, H and W: all that such coefficients need.

Every one of them is float32, float64 for float64 maps; so are weights and weight gradients ("the accumulation dtype").
Maps are channels_last in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops.library import accumulation_dtype

IDENTITY, RELU, RELU6, HARDSWISH, SILU = range(5)
HARDSIGMOID, SIGMOID = 5, 6  # gates of squeeze-and-excitation
ACTIVATION_NAMES = ("identity", "relu", "relu6", "hardswish", "silu", "hardsigmoid", "sigmoid")


def activate(u: Tensor, activation: int) -> Tensor:
    """h = act(u)."""
    functions = (lambda x: x, F.relu, F.relu6, F.hardswish, F.silu, F.hardsigmoid, torch.sigmoid)
    h: Tensor = functions[activation](u)
    return h


def derivative(u: Tensor, activation: int) -> Tensor:
    """act'(u), with torch's own values at the kinks."""
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        h = activate(leaf, activation)
        return torch.autograd.grad(h.sum(), leaf)[0] if activation != IDENTITY else torch.ones_like(u)


def per_channel(values: Tensor) -> Tensor:
    """(C,) or (N, C) as it multiplies a map."""
    return values.reshape(-1, values.shape[-1], 1, 1)


def normalised(x: Tensor, affine: Tensor | None) -> Tensor:
    """u in the accumulation dtype."""
    x = x.to(accumulation_dtype(x.dtype))
    return x if affine is None else x * per_channel(affine[0]) + per_channel(affine[1])


def gradient_behind_norm(du: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """dy from du, in the accumulation dtype."""
    a, b, c, center = (per_channel(row) for row in coefficients)
    return a * du + b * (y.to(du.dtype) - center) + c


def moments_of(y: Tensor) -> Tensor:
    """Two passes; zeros for an empty map."""
    wide = y.to(accumulation_dtype(y.dtype))
    if y.numel() == 0:
        return wide.new_zeros(2, y.shape[1])
    mean = wide.mean((0, 2, 3))
    return torch.stack((mean, (wide - per_channel(mean)).square().mean((0, 2, 3))))


def sums_of(du: Tensor, y: Tensor, center: Tensor) -> Tensor:
    """Rows sum(du) and sum(du * (y - center))."""
    return torch.stack((du.sum((0, 2, 3)), (du * (y.to(du.dtype) - per_channel(center))).sum((0, 2, 3))))


def none_like(x: Tensor) -> Tensor:
    """What stands for an output that was not asked for: no elements, accumulation dtype. A new one each time, for outputs of
    an op must not alias each other."""
    return x.new_empty(0, dtype=accumulation_dtype(x.dtype))


def empty_map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last map for the samples of ``like``."""
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself where it is dense in channels_last order, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)
