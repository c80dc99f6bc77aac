"""1x1 convolution in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.library import with_arguments_of


class Arguments(NamedTuple):
    """Of ``biasloss_ext::pointwise``."""

    x: Tensor
    weight: Tensor
    affine: Tensor | None = None
    activation: int = 0
    gate: Tensor | None = None
    bias: Tensor | None = None
    output_activation: int = 0
    residual: Tensor | None = None
    want_statistics: bool = False
    norm: maps.Norm = maps.Norm()


class BackwardArguments(NamedTuple):
    """Of ``biasloss_ext::pointwise_backward``."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    y: Tensor | None = None
    y_coefficients: Tensor | None = None
    affine: Tensor | None = None
    moments: Tensor | None = None
    activation: int = 0
    gate: Tensor | None = None
    residual_grad: Tensor | None = None
    any_origin: bool = False
    want_x: bool = True
    want_weight: bool = True
    eps: float = 1e-5
    frozen: bool = False


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    return h if gate is None else h * maps.per_channel(gate)


@with_arguments_of(Arguments, norm=maps.Norm)
def pointwise(call: Arguments) -> tuple[Tensor, Tensor]:
    x, weight, affine, activation, gate, bias, output_activation, residual, want_statistics, norm = call
    z = _gated(maps.activate(maps.normalized(x, affine), activation), gate)
    y = maps.activate(F.conv2d(z, weight.to(z.dtype), bias), output_activation)
    y = y if residual is None else y + residual.to(y.dtype)
    y = maps.channels_last(y.to(x.dtype))
    return y, maps.statistics_of(y, **norm._asdict()) if want_statistics else maps.none_like(x)


@with_arguments_of(BackwardArguments)
def pointwise_backward(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, moments, gate = call.x, call.moments, call.gate
    u = maps.normalized(x, call.affine)
    h = maps.activate(u, call.activation)
    dy = call.grad.to(u.dtype)
    if call.y is not None and call.y_coefficients is not None:
        dy = maps.gradient_behind_norm(dy, call.y, call.y_coefficients)
    none = maps.none_like(x)
    grad_weight = torch.einsum("nohw,nihw->oi", dy, _gated(h, gate))[:, :, None, None] if call.want_weight else none
    dz = torch.einsum("nohw,oi->nihw", dy, call.weight[:, :, 0, 0].to(dy.dtype))
    gate_grad = maps.none_like(x) if gate is None else (dz * h).sum((2, 3))
    dh = _gated(dz, gate)
    if call.residual_grad is not None:
        dh = dh + call.residual_grad.to(dh.dtype)
    sums, coefficients = maps.none_like(x), maps.none_like(x)
    if moments is not None:
        assert call.affine is not None
        slope = maps.derivative(u, call.activation)
        du = dh * slope
        if gate is None:
            coefficients = maps.coefficients_of(du, x, call.affine, moments, eps=call.eps, frozen=call.frozen)
        else:
            centered = x.to(u.dtype) - maps.per_channel(moments[0])
            terms = (du, slope, du * centered, slope * centered)
            sums = torch.stack([term.sum((2, 3)) for term in terms])
    grad_x = maps.channels_last(dh.to(x.dtype)) if call.want_x else x.new_empty(0)
    return grad_x, grad_weight, gate_grad, sums, coefficients
