"""1x1 convolution in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    return h if gate is None else h * maps.per_channel(gate)


def pointwise(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    activation: int,
    gate: Tensor | None,
    bias: Tensor | None,
    output_activation: int,
    residual: Tensor | None,
    want_moments: bool,
) -> tuple[Tensor, Tensor]:
    z = _gated(maps.activate(maps.normalised(x, affine), activation), gate)
    y = maps.activate(F.conv2d(z, weight.to(z.dtype), bias), output_activation)
    y = y if residual is None else y + residual.to(y.dtype)
    y = maps.channels_last(y.to(x.dtype))
    return y, maps.moments_of(y) if want_moments else maps.none_like(x)


def pointwise_backward(
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    center: Tensor | None,
    activation: int,
    gate: Tensor | None,
    residual_grad: Tensor | None,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u = maps.normalised(x, affine)
    h = maps.activate(u, activation)
    dy = grad.to(u.dtype)
    if y is not None and coefficients is not None:
        dy = maps.gradient_behind_norm(dy, y, coefficients)
    grad_weight = (
        torch.einsum("nohw,nihw->oi", dy, _gated(h, gate))[:, :, None, None] if want_weight else maps.none_like(x)
    )
    dz = torch.einsum("nohw,oi->nihw", dy, weight[:, :, 0, 0].to(dy.dtype))
    gate_grad = maps.none_like(x) if gate is None else (dz * h).sum((2, 3))
    dh = _gated(dz, gate)
    if residual_grad is not None:
        dh = dh + residual_grad.to(dh.dtype)
    sums = maps.none_like(x)
    if center is not None:
        slope, away = maps.derivative(u, activation), x.to(u.dtype) - maps.per_channel(center)
        terms = (dh * slope, slope, dh * slope * away, slope * away)
        sums = torch.stack([term.sum((2, 3)) for term in terms])
    return maps.channels_last(dh.to(x.dtype)) if want_x else x.new_empty(0), grad_weight, gate_grad, sums
