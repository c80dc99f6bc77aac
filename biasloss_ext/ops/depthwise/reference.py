"""Depthwise convolution in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from biasloss_ext.ops import maps
from biasloss_ext.ops.library import accumulation_dtype


def convolve(h: Tensor, weight: Tensor, stride: int) -> Tensor:
    """``h`` padded with zeros by half the kernel."""
    return F.conv2d(h, weight.to(h.dtype), stride=stride, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def depthwise(
    x: Tensor, weight: Tensor, affine: Tensor | None, activation: int, stride: int, want_moments: bool
) -> tuple[Tensor, Tensor]:
    h = maps.activate(maps.normalised(x, affine), activation)
    y = maps.channels_last(convolve(h, weight, stride).to(x.dtype))
    return y, maps.moments_of(y) if want_moments else maps.none_like(x)


def gradient_at_output(
    grad: Tensor | None,
    pool_grad: Tensor | None,
    y: Tensor | None,
    y_affine: Tensor | None,
    y_coefficients: Tensor | None,
    y_activation: int,
) -> Tensor:
    """dy, in the accumulation dtype, from the gradient at act(BN(y)); see :data:`op.SIGNATURE_OF_BACKWARD`."""
    if y is None:
        assert grad is not None
        return grad.to(accumulation_dtype(grad.dtype))
    assert y_coefficients is not None
    u = maps.normalised(y, y_affine)
    dh = u.new_zeros(u.shape) if grad is None else grad.to(u.dtype)
    if pool_grad is not None:
        dh = dh + maps.per_channel(pool_grad) / (y.shape[2] * y.shape[3])
    return maps.gradient_behind_norm(dh * maps.derivative(u, y_activation), y, y_coefficients)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, affine: Tensor | None, activation: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """du, the gradient of the weight, and u."""
    u = maps.normalised(x, affine)
    h = maps.activate(u, activation)
    padding, groups = weight.shape[-1] // 2, weight.shape[0]
    wide = weight.to(u.dtype)
    dh = conv2d_input(h.shape, wide, dy, stride, padding, groups=groups)
    grad_weight = conv2d_weight(h, wide.shape, dy, stride, padding, groups=groups)
    return dh * maps.derivative(u, activation), grad_weight, u


def depthwise_backward(
    grad: Tensor | None,
    pool_grad: Tensor | None,
    y: Tensor | None,
    y_affine: Tensor | None,
    y_coefficients: Tensor | None,
    y_activation: int,
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    center: Tensor | None,
    activation: int,
    stride: int,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = gradient_at_output(grad, pool_grad, y, y_affine, y_coefficients, y_activation)
    du, grad_weight, _ = gradients(dy, x, weight, affine, activation, stride)
    sums = maps.none_like(x) if center is None else maps.sums_of(du, x, center)
    grad_x = maps.channels_last(du.to(x.dtype)) if want_x else x.new_empty(0)
    return grad_x, grad_weight if want_weight else maps.none_like(x), sums
