"""The pieces of batch normalisation in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

import torch
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


def batch_norm_affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    mean, var = moments.unbind()
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -scale * mean
    return torch.stack((scale, shift if bias is None else shift + bias))


def batch_norm_coefficients(
    sums: Tensor, affine: Tensor, moments: Tensor, eps: float, count: int, frozen: bool
) -> tuple[Tensor, Tensor]:
    du, du_centred = sums.unbind()
    scale, (mean, var) = affine[0], moments.unbind()
    rstd = torch.rsqrt(var + eps)
    parameter_grads = torch.stack((rstd * du_centred, du))
    if frozen or count == 0:
        none = torch.zeros_like(scale)
        return torch.stack((scale, none, none, mean)), parameter_grads
    b = -scale * rstd.square() * du_centred / count
    return torch.stack((scale, b, -scale * du / count, mean)), parameter_grads
