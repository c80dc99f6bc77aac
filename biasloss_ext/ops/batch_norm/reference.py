"""The pieces of batch normalization in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps


def batch_norm_statistics(y: Tensor, **norm: Any) -> Tensor:
    return maps.statistics_of(y, **norm)


def batch_norm_affine(moments: Tensor, count: int, **norm: Any) -> Tensor:
    return maps.finish_statistics(moments, count, maps.Norm(**norm))


def batch_norm_apply(y: Tensor, affine: Tensor, *, activation: int = 0, residual: Tensor | None = None) -> Tensor:
    h = maps.activate(maps.normalized(y, affine), activation)
    h = h if residual is None else h + residual.to(h.dtype)
    return maps.channels_last(h.to(y.dtype))


def _du(grad: Tensor, y: Tensor, affine: Tensor, activation: int) -> Tensor:
    u = maps.normalized(y, affine)
    return grad.to(u.dtype) * maps.derivative(u, activation)


def batch_norm_coefficients(
    grad: Tensor, y: Tensor, affine: Tensor, moments: Tensor, *, activation: int = 0, **back: Any
) -> Tensor:
    return maps.coefficients_of(_du(grad, y, affine, activation), y, affine, moments, **back)


def batch_norm_backward(
    grad: Tensor, y: Tensor, affine: Tensor, coefficients: Tensor, *, activation: int = 0
) -> Tensor:
    dy = maps.gradient_behind_norm(_du(grad, y, affine, activation), y, coefficients)
    return maps.channels_last(dy.to(y.dtype))
