"""Depthwise convolution in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from biasloss_ext.ops import maps
from biasloss_ext.ops.library import accumulation_dtype


def zeros_around(h: Tensor, kernel: int, stride: int, same_padding: bool) -> tuple[int, int, int, int] | None:
    """Of TensorFlow's "same" padding, in the order of `F.pad`; None where it is half the kernel for every size.

    No branch on sizes: graphs that are recorded for sizes that vary hold for all of them.
    """
    if not same_padding or stride == 1:
        return None
    half = kernel // 2
    return half - 1 + h.shape[-1] % 2, half, half - 1 + h.shape[-2] % 2, half


def convolve(h: Tensor, weight: Tensor, stride: int, same_padding: bool = False) -> Tensor:
    """``h`` padded with zeros by half the kernel, or as TensorFlow's "same" does."""
    kernel, padding = weight.shape[-1], weight.shape[-1] // 2
    around = zeros_around(h, kernel, stride, same_padding)
    if around is not None:
        h, padding = F.pad(h, around), 0
    return F.conv2d(h, weight.to(h.dtype), stride=stride, padding=padding, groups=weight.shape[0])


def depthwise(
    x: Tensor,
    weight: Tensor,
    *,
    affine: Tensor | None = None,
    activation: int = 0,
    stride: int = 1,
    same_padding: bool = False,
    want_statistics: bool = False,
    **norm: Any,
) -> tuple[Tensor, Tensor]:
    h = maps.activate(maps.normalized(x, affine), activation)
    y = maps.channels_last(convolve(h, weight, stride, same_padding).to(x.dtype))
    return y, maps.statistics_of(y, **norm) if want_statistics else maps.none_like(x)


def gradient_at_output(
    grad: Tensor | None,
    pool_grad: Tensor | None,
    y: Tensor | None,
    y_affine: Tensor | None,
    y_coefficients: Tensor | None,
    y_activation: int,
) -> Tensor:
    """dy, in the accumulation dtype, from the gradient at act(BN(y)); see `op`."""
    if y is None:
        assert grad is not None
        return grad.to(accumulation_dtype(grad.dtype))
    assert y_coefficients is not None
    u = maps.normalized(y, y_affine)
    dh = u.new_zeros(u.shape) if grad is None else grad.to(u.dtype)
    if pool_grad is not None:
        dh = dh + maps.per_channel(pool_grad) / (y.shape[2] * y.shape[3])
    return maps.gradient_behind_norm(dh * maps.derivative(u, y_activation), y, y_coefficients)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    activation: int,
    stride: int,
    same_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """du, the gradient of the weight, and u."""
    u = maps.normalized(x, affine)
    h = maps.activate(u, activation)
    padding, groups = weight.shape[-1] // 2, weight.shape[0]
    wide = weight.to(u.dtype)
    around = zeros_around(h, weight.shape[-1], stride, same_padding)
    if around is not None:
        h, padding = F.pad(h, around), 0
    dh = conv2d_input(h.shape, wide, dy, stride, padding, groups=groups)
    grad_weight = conv2d_weight(h, wide.shape, dy, stride, padding, groups=groups)
    if around is not None:
        left, _, top, _ = around
        dh = dh[:, :, top : top + u.shape[2], left : left + u.shape[3]]
    return dh * maps.derivative(u, activation), grad_weight, u


def depthwise_backward(
    x: Tensor,
    weight: Tensor,
    *,
    grad: Tensor | None = None,
    pool_grad: Tensor | None = None,
    y: Tensor | None = None,
    y_affine: Tensor | None = None,
    y_coefficients: Tensor | None = None,
    y_activation: int = 0,
    affine: Tensor | None = None,
    moments: Tensor | None = None,
    activation: int = 0,
    stride: int = 1,
    same_padding: bool = False,
    residual_grad: Tensor | None = None,
    want_x: bool = True,
    want_weight: bool = True,
    **back: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = gradient_at_output(grad, pool_grad, y, y_affine, y_coefficients, y_activation)
    du, grad_weight, _ = gradients(dy, x, weight, affine, activation, stride, same_padding)
    coefficients = maps.none_like(x)
    if moments is not None:
        assert affine is not None
        coefficients = maps.coefficients_of(du, x, affine, moments, **back)
    if residual_grad is not None:
        du = du + residual_grad.to(du.dtype)
    grad_x = maps.channels_last(du.to(x.dtype)) if want_x else x.new_empty(0)
    return grad_x, grad_weight if want_weight else maps.none_like(x), coefficients
