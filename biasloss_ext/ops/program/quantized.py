"""The instructions of programs on maps of bytes, in plain PyTorch.

Levels are a pair (step, zero) of float32 values: a byte q stands for ``step * (q - zero)``. Weights are signed bytes, with one
step for each output. A convolution adds up products of bytes, exactly, and computes in float32

    ``act(sum * scale) + residual``, where sum = bias + sum over w * q and residual = step * (q - zero) of another map.

The zero of x and the bias of the layer are in ``bias``, both steps in ``scale``. The result is rounded to the levels of the map
that is written, ties to even, and clamped to 0 to 255; without levels it is float32. The compiled kernels compute the same
integers, but for SiLU, sigmoid and GELU: their exponentials differ by a few roundings, which may move a byte by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise.reference import zeros_around
from biasloss_ext.ops.program.code import Instruction, Operation
from biasloss_ext.ops.program.packing import unpack, unpack_taps


def run(i: Instruction, x: Tensor, other: Tensor | None, gate: Tensor | None, own: list[Tensor]) -> Tensor:
    """The result of an instruction from QUANTIZE on, with these constants."""
    match i.operation:
        case Operation.QUANTIZE:
            return _in_layout(_rounded(x, own[0]))
        case Operation.DEQUANTIZE:
            return dequantize(x, own[0])
        case Operation.QUANTIZED_CONVOLUTION:
            return _finish(i, _sums(i, x, own), other, own)
        case Operation.QUANTIZED_DEPTHWISE:
            return _finish(i, _depthwise_sums(i, x, own), other, own)
        case Operation.QUANTIZED_POOL:
            step, zero = own[0]
            positions = x.shape[2] * x.shape[3]
            mean: Tensor = (x.to(torch.int64).sum((2, 3)) - zero.long() * positions).float() * (step / positions)
            return mean
        case Operation.QUANTIZED_AVERAGE:
            assert other is not None
            return _average(x, other)
        case Operation.QUANTIZED_GATE:
            assert gate is not None
            (step, zero), to = own[:2]
            factor = gate[:, :, None, None] * (step * (1 / to[0]))
            return _in_layout(_to_bytes((x.float() - zero).double() * factor.double(), to[1]))
    raise ValueError(f"program: expected an operation below {len(Operation)}, got {i.operation}")


def dequantize(x: Tensor, levels: Tensor) -> Tensor:
    step, zero = levels
    values: Tensor = (x.float() - zero) * step
    return values


def _rounded(x: Tensor, levels: Tensor) -> Tensor:
    # In float64 the product is exact, as a fused multiply-add computes it.
    return _to_bytes(x.double() * (1 / levels[0]).double(), levels[1])


def _to_bytes(levels: Tensor, zero: Tensor) -> Tensor:
    return (levels + zero.double()).round().clamp(0, 255).to(torch.uint8)


def _in_layout(y: Tensor) -> Tensor:
    return maps.channels_last(y) if y.dim() == 4 else y.contiguous()


def _sums(i: Instruction, x: Tensor, own: list[Tensor]) -> Tensor:
    """In float64, which holds them exactly."""
    weight = unpack(own[0], i.outputs, x.shape[1], i.kernel).double()
    bias = own[1][: i.outputs].double()
    if x.dim() == 2:
        return F.linear(x.double(), weight.flatten(1), bias)
    around = (i.padding,) * 4
    return F.conv2d(_padded(x, around, own[3]), weight, bias, i.stride)


def _depthwise_sums(i: Instruction, x: Tensor, own: list[Tensor]) -> Tensor:
    weight = unpack_taps(own[0], i.outputs, i.kernel).double()
    around = zeros_around(x, i.kernel, i.stride, bool(i.same_padding)) or (i.kernel // 2,) * 4
    return F.conv2d(_padded(x, around, own[3]), weight, own[1][: i.outputs].double(), i.stride, groups=i.outputs)


def _padded(x: Tensor, around: tuple[int, ...], levels: Tensor) -> Tensor:
    """``x`` in float64 with its zero around it."""
    zero = levels[1].double()
    return F.pad(x.double() - zero, around) + zero


def _finish(i: Instruction, sums: Tensor, other: Tensor | None, own: list[Tensor]) -> Tensor:
    scale = own[2][: i.outputs]
    y = activate(sums.float() * (scale if sums.dim() == 2 else maps.per_channel(scale)), i.output_activation)
    if other is not None:
        y = y + dequantize(other, own[5])
    return _in_layout(y if own[4].numel() == 0 else _rounded(y, own[4]))


def activate(u: Tensor, activation: int) -> Tensor:
    """As the kernels round it where PyTorch divides."""
    if activation in (maps.HARDSWISH, maps.HARDSIGMOID):
        bounded = (u + 3).clamp(0, 6)
        sixth = torch.full((), 1 / 6, dtype=torch.float32)
        return (u * bounded if activation == maps.HARDSWISH else bounded) * sixth
    return maps.activate(u, activation)


def _average(x: Tensor, like: Tensor) -> Tensor:
    size = (like.shape[2], like.shape[3])
    # The sums of windows are whole numbers; the mean times their count is off by less than a half.
    counts = _window_counts(x, size)
    sums = (F.adaptive_avg_pool2d(x.double(), size) * counts).round()
    return _in_layout((sums * (1 / counts).float().double()).round().to(torch.uint8))


def _window_counts(x: Tensor, size: tuple[int, int]) -> Tensor:
    lengths = []
    for whole, parts in zip(x.shape[2:], size, strict=True):
        steps = range(parts)
        ends = [-(-(step + 1) * whole // parts) - step * whole // parts for step in steps]
        lengths.append(torch.tensor(ends, dtype=torch.float64))
    return lengths[0][:, None] * lengths[1]
