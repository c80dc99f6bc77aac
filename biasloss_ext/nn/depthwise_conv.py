"""Depthwise convolution on the fused kernels, as a drop-in replacement for `nn.Conv2d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext import checks, functional
from biasloss_ext.ops import backends, tracing


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` on depthwise kernels where they exist. To migrate, replace the class name.

    This is a subclass of `nn.Conv2d` with the same arguments, parameters, initialization and ``state_dict``. The kernels
    compute ``groups=in_channels=out_channels``, ``kernel_size`` 3, 5 or 7, ``stride`` 1 or 2, zero padding by
    ``kernel_size // 2`` (or "same", if that is equal) and no dilation. Every other convolution runs as `nn.Conv2d`. So does a
    call if no kernels can run: on devices without kernels (including meta), for complex numbers, for tensor subclasses, under
    torch.func, and in graphs recorded by torch.fx, torch.export, torch.onnx and torch.jit.

    Shape:
        - Input: (N, in_channels, H, W) or (in_channels, H, W) in any layout, float16, bfloat16, float32 or float64; the dtype
          of the weight.
        - Output: (N, out_channels, H', W') or without N, with ``H' = ceil(H / stride)`` on the kernels. Under autocast it has
          autocast's dtype; the kernels then cast the input but not the weight. Sums are accumulated in float32 (float64 for
          float64). The output is channels_last if the input or the weight is, and contiguous otherwise, as in `nn.Conv2d`.
          The kernels compute in channels_last: any other layout costs a copy each way.

    Gradients have the dtypes and strides of the parameters. With ``create_graph=True`` the backward pass is plain PyTorch and
    can be differentiated again. The kernels are deterministic and do not depend on the number of threads.

    Args:
        backend: "auto"; "cpu" or "cuda", which run on these kernels or raise; or "reference", plain PyTorch. Recorded graphs
            always hold plain PyTorch.

    Raises:
        ValueError: the backend is unknown, or a named one has no kernel for this convolution (on construction, or in a call
            after the module has changed). On the kernels: an input of another shape or device.
        TypeError: on the kernels, an input that is not floating point or, outside of autocast, has another dtype than the weight.
        RuntimeError: the named backend cannot run on the device of the input, or under torch.func.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        backends.check_name(backend)
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        options: dict[str, Any] = {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        super().__init__(*geometry, bias, **options)
        self.backend = backend
        _has_kernel(self)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            y: Tensor = self._conv_forward(x, self.weight, self.bias)
        else:  # TorchScript does not compile this branch
            y = self._forward_unscripted(x)
        return y

    @torch.jit.unused
    def _forward_unscripted(self, x: Tensor) -> Tensor:
        if tracing.exporting(x) or not _has_kernel(self):
            y: Tensor = self._conv_forward(x, self.weight, self.bias)
            return y
        return functional.depthwise_conv2d(x, self.weight, self.bias, _pair(self.stride)[0], backend=self.backend)

    def extra_repr(self) -> str:
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{super().extra_repr()}{backend}"


def _pair(value: Any) -> tuple[Any, Any]:
    """A size as a pair, whether the module holds a number or a pair."""
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)


def _has_kernel(conv: DepthwiseConv2d) -> bool:
    """Whether the kernels compute the convolution.

    Raises:
        ValueError: they do not, and a backend with kernels was named.
    """
    objections = without_kernel(conv)
    if objections and conv.backend not in ("auto", "reference"):
        raise ValueError(
            f"backend {conv.backend!r} has no kernel for {', '.join(objections)}; supported: kernel_size "
            f"{checks.DEPTHWISE_KERNELS}, stride {checks.DEPTHWISE_STRIDES}, padding=kernel_size // 2, dilation=1, "
            "groups=in_channels=out_channels, padding_mode='zeros' and real numbers. Use backend='auto', which leaves "
            "all others to PyTorch"
        )
    return not objections


def without_kernel(conv: nn.Conv2d) -> list[str]:
    """The arguments without a kernel, with their names."""
    kernel, stride, dilation = (_pair(value) for value in (conv.kernel_size, conv.stride, conv.dilation))
    half = (kernel[0] // 2, kernel[1] // 2)
    same = conv.padding == "same" and stride == (1, 1)
    channels = (conv.in_channels, conv.out_channels, conv.groups)
    fits = {
        "kernel_size": kernel[0] == kernel[1] and kernel[0] in checks.DEPTHWISE_KERNELS,
        "stride": stride[0] == stride[1] and stride[0] in checks.DEPTHWISE_STRIDES,
        "padding": same or _pair(conv.padding) == half,
        "dilation": dilation == (1, 1),
        "padding_mode": conv.padding_mode == "zeros",
    }
    objections = [f"{name}={getattr(conv, name)!r}" for name, does in fits.items() if not does]
    if len(set(channels)) > 1:
        objections.append("in_channels={}, out_channels={}, groups={}".format(*channels))
    if conv.weight.dtype not in checks.FLOAT_DTYPES:
        objections.append(f"dtype={conv.weight.dtype}")
    return objections


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each output channel depends on only one of several input channels."""
    return conv.groups == conv.in_channels > 1
