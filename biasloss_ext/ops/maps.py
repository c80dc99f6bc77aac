"""Shared parts of the ops on feature maps (N, C, H, W): layout, activations and channel sums, in plain PyTorch.

These terms are used in all ops of a depthwise-separable block, here and in csrc:

affine (2, C): rows scale and shift of a batch normalization. It maps x to ``u = scale * x + shift``, and an activation maps
    u to h. Both are applied while x is loaded; h is never stored.
moments (2, C): rows mean and biased variance of a map over N, H and W, computed from the stored values.
statistics (4, C): the moments of a map, then the affine of the batch normalization that follows it:
    ``scale = weight / sqrt(variance + eps)``, ``shift = bias - scale * mean``. The op that writes the map computes them, and
    updates the running statistics of the normalization (`NORM`).
coefficients (6, C): rows a, b, c and center of the backward pass of a batch normalization, then the gradients of its weight and
    bias. From du, the gradient at u, and the map y, ``dy = a * du + b * (y - center) + c``. The op that computes du finishes
    them (`BACK`): with rstd = 1 / sqrt(variance + eps), the gradients are ``rstd * sum(du * (y - mean))`` and ``sum(du)``,
    ``a = scale``, ``b = -scale * rstd^2 * sum(du * (y - mean)) / count``, ``c = -scale * sum(du) / count``, center the mean;
    b and c are 0 where the moments are constants (frozen). Ioffe and Szegedy, "Batch Normalization", 2015.

All of them are float32, or float64 for float64 maps; so are weights and weight gradients ("the accumulation dtype").
Maps are channels_last in memory.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.ops.library import accumulation_dtype

# The arguments of an op that finishes the batch normalization after the map it writes. running_mean and running_var move by
# ``momentum`` towards the mean and the unbiased variance, and num_batches_tracked increases by one; each may be None.
NORM = (
    "Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
    "Tensor(c!)? num_batches_tracked=None, float momentum=0.1, float eps=1e-05"
)


class Norm(NamedTuple):
    """The values of `NORM`."""

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5


# The arguments of an op that finishes the coefficients of the batch normalization before its input.
BACK = "float eps=1e-05, bool frozen=False"


class Back(NamedTuple):
    """The values of `BACK`."""

    eps: float = 1e-5
    frozen: bool = False


class Activation(enum.IntEnum):
    """The activations that the kernels apply, by the number that the ops take."""

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    HARDSWISH = 3
    SILU = 4
    HARDSIGMOID = 5  # this one and the next are gates of squeeze-and-excitation
    SIGMOID = 6
    GELU = 7  # the exact form
    GELU_TANH = 8  # F.gelu(approximate="tanh")


IDENTITY, RELU, RELU6, HARDSWISH, SILU, HARDSIGMOID, SIGMOID, GELU, GELU_TANH = map(int, Activation)
LAST_ACTIVATION = max(map(int, Activation))


def checked_activation(activation: int, name: str = "activation") -> int:
    """The number of an activation.

    Raises:
        ValueError: the number is not one of an activation.
    """
    if not 0 <= activation <= LAST_ACTIVATION:
        known = ", ".join(f"{int(known)} ({known.name.lower()})" for known in Activation)
        raise ValueError(f"unknown {name} {activation}; supported: {known}")
    return int(activation)


def activate(u: Tensor, activation: int) -> Tensor:
    """h = act(u)."""
    h: Tensor = OF_TORCH[checked_activation(activation)].function(u)
    return h


class OfTorch(NamedTuple):
    """What of torch applies an activation.

    Attributes:
        function: on a tensor.
        layers: classes whose attributes do not change what they compute.
        others: further functions, and names of methods of a tensor.
        kinks: where the derivative jumps.
    """

    function: Callable[[Tensor], Tensor]
    layers: tuple[type[nn.Module], ...] = ()
    others: tuple[object, ...] = ()
    kinks: tuple[float, ...] = ()


# In the order of the numbers. The forms of GELU are told by an argument, see biasloss_ext/nn/activations.py.
OF_TORCH = (
    OfTorch(lambda u: u, (nn.Identity,)),
    OfTorch(F.relu, (nn.ReLU,), (torch.relu, "relu", "relu_"), kinks=(0,)),
    OfTorch(F.relu6, (nn.ReLU6,), kinks=(0, 6)),
    OfTorch(F.hardswish, (nn.Hardswish,), kinks=(-3, 3)),
    OfTorch(F.silu, (nn.SiLU,)),
    OfTorch(F.hardsigmoid, (nn.Hardsigmoid,), kinks=(-3, 3)),
    OfTorch(torch.sigmoid, (nn.Sigmoid,), (F.sigmoid, "sigmoid", "sigmoid_")),
    OfTorch(F.gelu),
    OfTorch(functools.partial(F.gelu, approximate="tanh")),
)


def derivative(u: Tensor, activation: int) -> Tensor:
    """act'(u), with torch's own values at the kinks."""
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        h = activate(leaf, activation)
        return torch.autograd.grad(h.sum(), leaf)[0] if activation != IDENTITY else torch.ones_like(u)


def per_channel(values: Tensor) -> Tensor:
    """(C,) or (N, C) in a shape that multiplies a map."""
    return values.reshape(-1, values.shape[-1], 1, 1)


def normalized(x: Tensor, affine: Tensor | None) -> Tensor:
    """u in the accumulation dtype."""
    x = x.to(accumulation_dtype(x.dtype))
    return x if affine is None else x * per_channel(affine[0]) + per_channel(affine[1])


def gradient_behind_norm(du: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """dy from du, in the accumulation dtype."""
    a, b, c, center = (per_channel(row) for row in coefficients[:4])
    return a * du + b * (y.to(du.dtype) - center) + c


def with_pool_gradient(grad: Tensor, pool_grad: Tensor | None) -> Tensor:
    """The gradient at a map, plus the gradient at its pool (N, C), which all positions share equally."""
    if pool_grad is None:
        return grad
    share = per_channel(pool_grad / (grad.shape[2] * grad.shape[3]))
    return channels_last(grad + share.to(grad.dtype))


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


def finish_statistics(moments: Tensor, count: int, norm: Norm) -> Tensor:
    """Statistics (4, C) of the moments of ``count`` values per channel; updates the running statistics."""
    mean, variance = moments.unbind()
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if norm.norm_weight is None else scale * norm.norm_weight
    shift = -scale * mean
    shift = shift if norm.norm_bias is None else shift + norm.norm_bias
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is not None and count > 0:
        norm.running_mean.lerp_(mean, norm.momentum)
    if norm.running_var is not None and count > 0:
        norm.running_var.lerp_(variance * (count / max(count - 1, 1)), norm.momentum)
    return torch.stack((mean, variance, scale, shift))


def statistics_of(y: Tensor, **norm: Any) -> Tensor:
    """Statistics (4, C) of a map."""
    return finish_statistics(moments_of(y), y.numel() // max(y.shape[1], 1), Norm(**norm))


def finish_coefficients(sums: Tensor, affine: Tensor, moments: Tensor, count: int, **back: Any) -> Tensor:
    """Coefficients (6, C) from rows sum(du) and sum(du * (y - mean)) over ``count`` values per channel."""
    eps, frozen = Back(**back)
    du, du_centered = sums.unbind()
    scale, (mean, variance) = affine[0], moments.unbind()
    rstd = torch.rsqrt(variance + eps)
    b, c = torch.zeros_like(scale), torch.zeros_like(scale)
    if not frozen and count > 0:
        b, c = -scale * rstd.square() * du_centered / count, -scale * du / count
    return torch.stack((scale, b, c, mean, rstd * du_centered, du))


def coefficients_of(du: Tensor, y: Tensor, affine: Tensor, moments: Tensor, **back: Any) -> Tensor:
    """Coefficients (6, C) from du, the gradient at ``affine(y)``."""
    count = y.numel() // max(y.shape[1], 1)
    return finish_coefficients(sums_of(du, y, moments[0]), affine, moments, count, **back)


def none_like(x: Tensor) -> Tensor:
    """Placeholder for an output that was not requested: no elements, accumulation dtype. It is new each time, since the outputs
    of an op must not alias each other."""
    return x.new_empty(0, dtype=accumulation_dtype(x.dtype))


def empty_map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized channels_last map for the samples of ``like``."""
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself if it is dense in channels_last order, otherwise a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's convolutions treat a 4-D tensor with these strides, dense or not, as channels_last."""
    sizes, strides = x.shape, x.stride()
    smallest = 0
    for dimension in (1, 3, 2, 0):
        if sizes[dimension] == 0 or strides[dimension] < smallest or strides[1] == 0:
            return False
        if dimension == 0 and smallest == strides[1]:  # every dimension but the first has size 1
            return False
        smallest = strides[dimension] * max(sizes[dimension], 1)
    return True


def in_layout_of(parameter: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the dtype, shape and strides of its parameter, which DistributedDataParallel expects."""
    if grad.dtype is not parameter.dtype:
        grad = grad.to(parameter.dtype)
    shape, strides = parameter.shape, parameter.stride()
    if grad.stride() == strides and grad.shape == shape:
        return grad
    if parameter.is_contiguous():  # other strides of dimensions of size 1
        return grad.contiguous().as_strided(shape, strides)
    grad = grad.reshape(shape)
    if grad.stride() == strides:
        return grad
    return torch.empty_like(parameter).copy_(grad)
