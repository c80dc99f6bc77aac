"""The pieces of batch normalisation in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.ops import maps


def batch_norm_moments(y: Tensor) -> Tensor:
    return maps.moments_of(y)


def batch_norm_apply(y: Tensor, affine: Tensor, activation: int, residual: Tensor | None) -> Tensor:
    h = maps.activate(maps.normalised(y, affine), activation)
    h = h if residual is None else h + residual.to(h.dtype)
    return maps.channels_last(h.to(y.dtype))


def _du(grad: Tensor, y: Tensor, affine: Tensor, activation: int) -> Tensor:
    u = maps.normalised(y, affine)
    return grad.to(u.dtype) * maps.derivative(u, activation)


def batch_norm_sums(grad: Tensor, y: Tensor, affine: Tensor, center: Tensor, activation: int) -> Tensor:
    return maps.sums_of(_du(grad, y, affine, activation), y, center)


def batch_norm_backward(grad: Tensor, y: Tensor, affine: Tensor, coefficients: Tensor, activation: int) -> Tensor:
    dy = maps.gradient_behind_norm(_du(grad, y, affine, activation), y, coefficients)
    return maps.channels_last(dy.to(y.dtype))
