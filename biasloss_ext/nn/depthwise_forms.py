"""Depthwise convolutions of forms that no single kernel computes, put together from those that there are.

`accelerate` exchanges an `nn.Conv2d` for its twin, which shares parameters, hooks and everything else with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext import checks, functional
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d, without_kernel
from biasloss_ext.nn.fused_chain import why_not_here
from biasloss_ext.ops import maps, tracing
from biasloss_ext.ops.depthwise import op, reference
from biasloss_ext.ops.library import accumulation_dtype

WINDOWS = {9: 5, 11: 7, 13: 7}  # kernel sizes, and the size of the four windows that cover such a kernel


class MultipliedDepthwiseConv2d(nn.Conv2d):
    """A convolution with several outputs per input channel: one depthwise convolution for the first output of every channel, one
    for the second, and so on. One of 1x1 is a multiplication. The output is channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        if tracing.exporting(x) or x.dim() != 4 or why_not_here(x) is not None:
            y: Tensor = self._conv_forward(x, self.weight, self.bias)
            return y
        x, count = maps.channels_last(x), self.out_channels // self.in_channels
        if self.kernel_size == (1, 1):
            return self._multiplied(x[:, :, :: self.stride[0], :: self.stride[1]])
        bias: Any = [None] * count if self.bias is None else [self.bias[i::count] for i in range(count)]
        parts = [functional.depthwise_conv2d(x, self.weight[i::count], bias[i], self.stride[0]) for i in range(count)]
        return _by_channel(torch.stack([part.permute(0, 2, 3, 1) for part in parts], -1))

    def _multiplied(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        weight = self.weight.reshape(self.in_channels, -1).to(x.dtype)
        y = _by_channel(x.permute(0, 2, 3, 1)[..., None] * weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


def _by_channel(parts: Tensor) -> Tensor:
    """The map (N, C * M, H, W) of values (N, H, W, C, M)."""
    return parts.flatten(-2).permute(0, 3, 1, 2)


class LargeDepthwiseConv2d(nn.Conv2d):
    """A convolution with a kernel of 9x9 to 13x13: PyTorch computes its result, and the kernels of smaller ones its gradients
    where PyTorch has only slow ones, on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if tracing.exporting(x) or not _is_slow_in_training(x, self.weight):
            y: Tensor = self._conv_forward(x, self.weight, self.bias)
            return y
        y = _LargeConvolution.apply(maps.channels_last(x), self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]


def _is_slow_in_training(x: Tensor, weight: Tensor) -> bool:
    if not torch.is_grad_enabled() or x.dim() != 4 or x.device.type != "cpu" or x.dtype is not weight.dtype:
        return False
    if torch.is_autocast_enabled("cpu") or tracing.transformed(x, weight):
        return False
    return why_not_here(x) is None


class _LargeConvolution(torch.autograd.Function):
    """x channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        x, grad = maps.channels_last(x), maps.channels_last(grad)
        want_x, want_weight = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            found = reference.depthwise_backward(x, weight, grad=grad, want_x=want_x, want_weight=want_weight)
            return found[0] if want_x else None, found[1] if want_weight else None
        grad_x = _convolved(grad, weight.flip(2, 3)) if want_x else None
        grad_weight = maps.in_layout_of(weight, _weight_gradient(x, grad, weight.shape)) if want_weight else None
        return grad_x, grad_weight


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _weight_gradient(x: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradients of four windows of the kernel, which overlap: each is that of a smaller kernel, at a map that is shifted."""
    kernel, window = shape[-1], WINDOWS[shape[-1]]
    reach = window // 2
    found = x.new_empty(shape, dtype=accumulation_dtype(x.dtype))
    small = found.new_zeros(shape[0], 1, window, window)
    grad = maps.channels_last(F.pad(grad, (reach,) * 4))  # for the rows and columns that only a shifted map has
    for row in (0, kernel - window):
        for column in (0, kernel - window):
            down, right = (first + reach - kernel // 2 for first in (row, column))
            shifted = F.pad(x, (reach - right, reach + right, reach - down, reach + down))
            part = op.backward(maps.channels_last(shifted), small, grad=grad, want_x=False)[1]
            found[:, :, row : row + window, column : column + window] = part
    return found


def form_of(conv: nn.Module) -> type[nn.Conv2d] | None:
    """The class whose kernels compute a convolution, or its gradients; None if there is none."""
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, *FORMS):
        return None
    if not without_kernel(conv):
        return DepthwiseConv2d
    if conv.weight.dtype not in checks.FLOAT_DTYPES or conv.groups != conv.in_channels:
        return None
    if conv.out_channels > conv.in_channels:
        if conv.kernel_size == (1, 1):
            return MultipliedDepthwiseConv2d if conv.padding in ((0, 0), "valid", "same") else None
        one = nn.Conv2d(1, 1, conv.kernel_size, conv.stride, conv.padding, conv.dilation, device="meta")  # type: ignore[arg-type]
        one.padding_mode = conv.padding_mode
        return MultipliedDepthwiseConv2d if not without_kernel(one) else None
    size = conv.kernel_size[0]
    half = conv.padding == "same" or conv.padding == (size // 2,) * 2
    plain = (conv.stride, conv.dilation, conv.padding_mode) == ((1, 1), (1, 1), "zeros")
    return LargeDepthwiseConv2d if plain and half and conv.kernel_size == (size, size) and size in WINDOWS else None


FORMS = (DepthwiseConv2d, MultipliedDepthwiseConv2d, LargeDepthwiseConv2d)


def twin_of(conv: nn.Conv2d, form: type[nn.Conv2d]) -> nn.Conv2d:
    """A convolution of a form that shares parameters, hooks and everything else with a convolution."""
    twin = form.__new__(form)
    twin.__dict__.update(conv.__dict__)
    if form is DepthwiseConv2d:
        twin.backend = "auto"  # type: ignore[assignment]
    return twin
