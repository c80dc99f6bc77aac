"""Depthwise convolution on the fused kernels, as a drop-in for `nn.Conv2d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext import checks, functional


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(channels, channels, kernel_size, stride, padding=kernel_size // 2, groups=channels)``, made fast.

    A subclass of `nn.Conv2d`: parameters, their initialisation and the state dict are the same.
    Input (N, channels, H, W) or (channels, H, W) of float16, bfloat16, float32 or float64 in any layout; output
    (N, channels, ceil(H / stride), ceil(W / stride)), channels_last, dtype of the input. Sums are taken in float32
    (float64 for float64). Deterministic. Under autocast the input is cast, the weight is not; gradients have the
    dtypes of what they belong to. With ``create_graph=True`` the backward pass is plain PyTorch and can be
    differentiated again.

    Args:
        channels: of input and output.
        kernel_size: 3, 5 or 7.
        stride: 1 or 2.
        backend: "auto", "reference", "cpu" or "cuda".

    Raises:
        ValueError: no kernel for these sizes (on construction, or on a call after they were changed), an input of
            another shape, or no such backend.
        TypeError: an input that is not floating point.
        RuntimeError: the named backend cannot run on the device of the input.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        kernel = checks.depthwise_sizes(kernel_size, stride)[0]
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias, **placement)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        checks.depthwise_convolution(self)
        return functional.depthwise_conv2d(x, self.weight, self.bias, self.stride[0], backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"
