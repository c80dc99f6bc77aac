"""The plain depthwise convolution with its gradients: the op without normalisation, activation and sums."""

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
        y: Tensor = op.forward(x, weight, None, maps.IDENTITY, stride, False, device=x.device, backend=backend)[0]
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.backend = stride, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dy = (maps.channels_last(grad), None, None, None, None, maps.IDENTITY)
        want_x, want_weight = ctx.needs_input_grad[:2]
        arguments = (*dy, x, weight, None, None, maps.IDENTITY, ctx.stride, want_x, want_weight)
        if torch.is_grad_enabled():  # create_graph=True: the reference can be differentiated again
            grad_x, grad_weight, _ = reference.depthwise_backward(*arguments)
        else:
            grad_x, grad_weight, _ = op.backward(*arguments, device=x.device, backend=ctx.backend)
        return grad_x if want_x else None, grad_weight if want_weight else None, None, None


def convolve(x: Tensor, weight: Tensor, stride: int, backend: str) -> Tensor:
    """x (N, C, H, W) in any layout, weight (C, 1, k, k) in any floating dtype; the result is channels_last."""
    wide = weight.to(accumulation_dtype(x.dtype)).contiguous()
    y: Tensor = _Convolution.apply(maps.channels_last(x), wide, stride, backend)
    return y
