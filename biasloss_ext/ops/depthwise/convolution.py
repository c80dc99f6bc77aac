"""The plain depthwise convolution with its gradients: the op without normalization, activation and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext import checks
from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import op, reference
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.tracing import has_autocast


class _Convolution(torch.autograd.Function):
    """x channels_last; weight in any dtype and layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, same_padding: bool, backend: str) -> Tensor:
        geometry = {"stride": stride, "same_padding": same_padding}
        y: Tensor = op.forward(x, _accumulated(weight, x), **geometry, backend=backend)[0]
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.backend = geometry, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[:2]
        options = {"grad": maps.channels_last(grad), **ctx.geometry, "want_x": want_x, "want_weight": want_weight}
        if torch.is_grad_enabled():  # create_graph=True: the reference can be differentiated again
            grad_x, grad_weight, _ = reference.depthwise_backward(x, _accumulated(weight, x), **options)
        else:
            grad_x, grad_weight, _ = op.backward(x, _accumulated(weight, x), **options, backend=ctx.backend)
        of_weight = maps.in_layout_of(weight, grad_weight) if want_weight else None
        return grad_x if want_x else None, of_weight, None, None, None


def _accumulated(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(accumulation_dtype(x.dtype)).contiguous()


def convolve_images(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, same_padding: bool, backend: str
) -> Tensor:
    """As `functional.depthwise_conv2d`, of which the arguments are, on a backend.

    Raises:
        TypeError: the dtypes differ.
    """
    kind = x.device.type
    autocast = has_autocast(kind) and torch.is_autocast_enabled(kind)
    checks.depthwise_dtypes(x, weight, bias, autocast)
    images = x if x.dim() == 4 else x[None]
    format_is_channels_last = maps.is_channels_last(images) or maps.is_channels_last(weight)
    if autocast and x.dtype != torch.float64:
        images = images.to(torch.get_autocast_dtype(kind))
    y: Tensor = _Convolution.apply(maps.channels_last(images), weight, stride, same_padding, backend)
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None, None]
    if not format_is_channels_last:
        y = y.flatten(1).view(y.shape)  # where a size is 1, contiguous() would leave other strides, as of channels_last
    return y if x.dim() == 4 else y[0]
