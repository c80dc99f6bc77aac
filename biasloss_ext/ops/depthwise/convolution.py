"""The plain depthwise convolution with its gradients: the op without normalization, activation and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import op, reference
from biasloss_ext.ops.library import accumulation_dtype


class _Convolution(torch.autograd.Function):
    """x channels_last; weight in the accumulation dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, backend: str) -> Tensor:
        y: Tensor = op.forward(x, weight, stride=stride, backend=backend)[0]
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.backend = stride, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[:2]
        options = {
            "grad": maps.channels_last(grad), "stride": ctx.stride, "want_x": want_x, "want_weight": want_weight,
        }  # fmt: skip
        if torch.is_grad_enabled():  # create_graph=True: the reference can be differentiated again
            grad_x, grad_weight, _ = reference.depthwise_backward(x, weight, **options)
        else:
            grad_x, grad_weight, _ = op.backward(x, weight, **options, backend=ctx.backend)
        return grad_x if want_x else None, grad_weight if want_weight else None, None, None


def convolve(x: Tensor, weight: Tensor, stride: int, backend: str) -> Tensor:
    """x (N, C, H, W) in any layout, weight (C, 1, k, k) in any floating dtype; the result is channels_last."""
    wide = weight.to(accumulation_dtype(x.dtype)).contiguous()
    y: Tensor = _Convolution.apply(maps.channels_last(x), wide, stride, backend)
    return y
