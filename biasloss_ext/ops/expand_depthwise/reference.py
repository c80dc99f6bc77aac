"""Expansion and depthwise convolution in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import reference as depthwise
from biasloss_ext.ops.library import accumulation_dtype, with_arguments_of


class BackwardArguments(NamedTuple):
    """Of ``biasloss_ext::expand_depthwise_backward``."""

    x: Tensor
    x_mean: Tensor
    expand_weight: Tensor
    affine: Tensor
    moments: Tensor
    weight: Tensor
    y: Tensor
    y_affine: Tensor
    y_coefficients: Tensor
    grad: Tensor | None = None
    pool_grad: Tensor | None = None
    y_activation: int = 0
    activation: int = 0
    stride: int = 1
    same_padding: bool = False
    back: maps.Back = maps.Back()


def channel_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.to(accumulation_dtype(x.dtype)).permute(0, 2, 3, 1).flatten(0, 2)
    if rows.shape[0] == 0:
        return rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
    mean = rows.mean(0)
    return mean, (rows - mean).T @ (rows - mean)


def channel_gram_product(
    x: Tensor, mean: Tensor, gram: Tensor, weight: Tensor, weight_gram: Tensor
) -> tuple[Tensor, Tensor]:
    """All of it from x."""
    rows = x.to(mean.dtype).permute(0, 2, 3, 1).flatten(0, 2) - mean
    y = rows @ weight.T
    count = max(rows.shape[0], 1)
    away = y.sum(0) / count
    moments = torch.stack((weight @ mean + away, y.square().sum(0) / count - away.square()))
    return y.T @ rows, moments if rows.shape[0] > 0 else torch.zeros_like(moments)


def _expanded(x: Tensor, expand_weight: Tensor) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    return F.conv2d(wide, expand_weight.to(wide.dtype))


def _convolved(
    x: Tensor, expand_weight: Tensor, affine: Tensor, activation: int, weight: Tensor, stride: int, same_padding: bool
) -> Tensor:
    h = maps.activate(maps.normalized(_expanded(x, expand_weight), affine), activation)
    return depthwise.convolve(h, weight, stride, same_padding)


def expand_depthwise(
    x: Tensor,
    expand_weight: Tensor,
    affine: Tensor,
    weight: Tensor,
    *,
    activation: int = 0,
    stride: int = 1,
    same_padding: bool = False,
    want_statistics: bool = False,
    **norm: Any,
) -> tuple[Tensor, Tensor]:
    y = maps.channels_last(_convolved(x, expand_weight, affine, activation, weight, stride, same_padding).to(x.dtype))
    return y, maps.statistics_of(y, **norm) if want_statistics else maps.none_like(x)


def expand_depthwise_activate(
    x: Tensor,
    expand_weight: Tensor,
    affine: Tensor,
    weight: Tensor,
    y_affine: Tensor,
    *,
    activation: int = 0,
    stride: int = 1,
    same_padding: bool = False,
    y_activation: int = 0,
    want_pool: bool = False,
) -> tuple[Tensor, Tensor]:
    y = _convolved(x, expand_weight, affine, activation, weight, stride, same_padding)
    h = maps.channels_last(maps.activate(maps.normalized(y, y_affine), y_activation).to(x.dtype))
    return h, h.to(y.dtype).mean((2, 3)) if want_pool else maps.none_like(x)


@with_arguments_of(BackwardArguments, back=maps.Back)
def expand_depthwise_backward(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, expand_weight, affine = call.x, call.expand_weight, call.affine
    dy = depthwise.gradient_at_output(
        call.grad, call.pool_grad, call.y, call.y_affine, call.y_coefficients, call.y_activation
    )
    y1 = _expanded(x, expand_weight)
    du, grad_weight, _ = depthwise.gradients(
        dy, y1, call.weight, affine, call.activation, call.stride, call.same_padding
    )
    scaled = du * maps.per_channel(affine[0])
    grad_x = torch.einsum("nohw,oi->nihw", scaled, expand_weight[:, :, 0, 0].to(du.dtype))
    centered = x.to(du.dtype) - maps.per_channel(call.x_mean)
    grad_expand = torch.einsum("nohw,nihw->oi", du, centered)[:, :, None, None]
    coefficients = maps.coefficients_of(du, y1, affine, call.moments, **call.back._asdict())
    return maps.channels_last(grad_x), grad_expand, grad_weight, coefficients
