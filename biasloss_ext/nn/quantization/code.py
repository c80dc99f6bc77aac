"""Writes the code of quantized programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from biasloss_ext.nn.inference_block import packed
from biasloss_ext.nn.program_code import Writer, packed_kernel
from biasloss_ext.nn.quantization.layers import Kind, Layer
from biasloss_ext.nn.quantization.levels import Levels
from biasloss_ext.nn.quantization.weights import LARGEST_BIAS, LARGEST_WEIGHT, quantized_weight
from biasloss_ext.ops.program.code import Instruction, Operation
from biasloss_ext.ops.program.packing import pack, pack_taps, padded

DEEPEST = (2**31 - 1 - LARGEST_BIAS) // (255 * LARGEST_WEIGHT)  # products whose sum fits int32 beside the bias
DEPTHWISE_KERNELS = (3, 5, 7)
WITH_WEIGHTS = (Kind.CONVOLUTION, Kind.DEPTHWISE, Kind.LINEAR)


def objection(layer: Layer) -> str | None:
    """Why a layer stays in float32, or None."""
    if layer.kind is Kind.NORMALIZE:
        return "it has no int8 kernel"
    if layer.kind is Kind.DEPTHWISE and (layer.tensors[0].shape[-1] not in DEPTHWISE_KERNELS or layer.stride > 2):
        return f"its kernel is none of {DEPTHWISE_KERNELS}, or its stride more than 2"
    if layer.kind in WITH_WEIGHTS and layer.tensors[0][0].numel() > DEEPEST:
        return f"it adds up more than {DEEPEST} products"
    return None


class QuantizedWriter:
    """Collects the instructions of a program on bytes, with conversions where a layer reads or writes float32.

    Attributes:
        writer: has the instructions and constants.
        int8: how many layers of each kind run on bytes.
        float32: how many do not.
    """

    def __init__(self, layers: list[Layer], output: int, levels: dict[int, Levels]) -> None:
        self.writer = Writer(torch.float32)
        self.int8: Counter[Kind] = Counter()
        self.float32: Counter[Kind] = Counter()
        self._levels = levels
        self._of_levels: dict[Levels, Tensor] = {}
        self._bytes: dict[int, int] = {}  # the numbers that values have in this program
        self._floats: dict[int, int] = {0: 0}
        self._wanted_as_bytes = read_as_bytes(layers)
        for layer in layers:
            self._add(layer)
        self.result = self._as_float(output)

    def _add(self, layer: Layer) -> None:
        takes_bytes = objection(layer) is None
        if layer.kind is Kind.POOL or layer.kind is Kind.AVERAGE:
            takes_bytes = layer.input in self._bytes
        (self.int8 if takes_bytes else self.float32)[layer.kind] += 1
        if not takes_bytes:
            self._add_float(layer)
        elif layer.kind in WITH_WEIGHTS:
            self._add_convolution(layer)
        elif layer.kind is Kind.POOL:
            levels = self._tensor(layer.input)
            self._write(Operation.QUANTIZED_POOL, layer, self._floats, levels, input=self._as_bytes(layer.input))
        elif layer.kind is Kind.AVERAGE:
            operands = {"input": self._as_bytes(layer.input), "other": self._as_bytes(layer.other)}
            self._write(Operation.QUANTIZED_AVERAGE, layer, self._bytes, **operands)
        else:
            x_levels, y_levels = self._tensor(layer.input), self._tensor(layer.output)
            operands = {"input": self._as_bytes(layer.input), "gate": self._as_float(layer.other)}
            self._write(Operation.QUANTIZED_GATE, layer, self._bytes, x_levels, y_levels, **operands)

    def _add_convolution(self, layer: Layer) -> None:
        weight, bias = layer.tensors
        from_levels = self._levels[layer.input]
        is_depthwise = layer.kind is Kind.DEPTHWISE
        quantized, weight_step = quantized_layer(layer, from_levels)
        step = weight_step * from_levels.step
        of_bias = (bias.double() / step).round() - from_levels.zero * quantized.flatten(1).sum(1)
        to_bytes = layer.output in self._wanted_as_bytes
        constants = [
            packing_of(layer)(quantized).to(torch.int8),
            padded(of_bias).to(torch.int32),
            padded(step).float(),
            self._tensor(layer.input),
            self._tensor(layer.output) if to_bytes else torch.empty(0),
        ]
        other = -1
        if layer.other >= 0:
            other = self._as_bytes(layer.other)
            constants.append(self._tensor(layer.other))
        self._write(
            Operation.QUANTIZED_DEPTHWISE if is_depthwise else Operation.QUANTIZED_CONVOLUTION,
            layer,
            self._bytes if to_bytes else self._floats,
            *constants,
            input=self._as_bytes(layer.input),
            other=other,
            output_activation=layer.activation,
            stride=layer.stride,
            same_padding=int(layer.same_padding),
            padding=layer.padding,
            kernel=quantized.shape[-1],
            outputs=weight.shape[0],
        )

    def _add_float(self, layer: Layer) -> None:
        x, own = self._as_float(layer.input), layer.tensors
        other = self._as_float(layer.other) if layer.other >= 0 else -1
        fields: dict[str, Any] = {"input": x, "output_activation": layer.activation}
        match layer.kind:
            case Kind.NORMALIZE:
                fields = {"input": x, "activation": layer.activation, "other": other}
                self._write(Operation.NORMALIZE, layer, self._floats, own[0], **fields)
            case Kind.DEPTHWISE:
                weight, bias = own
                geometry = {"stride": layer.stride, "same_padding": int(layer.same_padding)}
                self._write(Operation.DEPTHWISE, layer, self._floats, weight.contiguous(), input=x, **geometry)
                affine = torch.stack((torch.ones_like(bias), bias))
                fields = {"input": self._floats[layer.output], "activation": layer.activation}
                self._write(Operation.NORMALIZE, layer, self._floats, affine, **fields)
            case Kind.LINEAR:
                self._write(Operation.LINEAR, layer, self._floats, own[0].contiguous(), own[1], **fields)
            case Kind.POOL:
                self._write(Operation.POOL, layer, self._floats, input=x)
            case Kind.AVERAGE:
                self._write(Operation.AVERAGE, layer, self._floats, input=x, other=other)
            case Kind.CONVOLUTION if own[0].shape[-1] == 1 and layer.stride == 1:
                self._write(Operation.POINTWISE, layer, self._floats, packed(own[0]), own[1], other=other, **fields)
            case Kind.CONVOLUTION:
                fields.update(stride=layer.stride, padding=layer.padding)
                self._write(Operation.CONVOLUTION, layer, self._floats, packed_kernel(own[0]), own[1], **fields)
            case _:
                raise AssertionError(layer.kind)

    def _write(self, operation: Operation, layer: Layer, to: dict[int, int], *constants: Tensor, **fields: Any) -> None:
        to[layer.output] = self._append(operation, constants, **fields)

    def _append(self, operation: Operation, constants: tuple[Tensor, ...], **fields: Any) -> int:
        writer = self.writer
        number = writer.value()
        writer.instructions.append(Instruction(int(operation), number, constants=len(writer.constants), **fields))
        writer.constants += [constant.detach() for constant in constants]
        return number

    def _tensor(self, number: int) -> Tensor:
        """The levels of a value; one tensor for all that have the same."""
        levels = self._levels[number]
        if levels not in self._of_levels:
            self._of_levels[levels] = levels.tensor()
        return self._of_levels[levels]

    def _as_bytes(self, number: int) -> int:
        if number not in self._bytes:
            x = self._floats[number]
            self._bytes[number] = self._append(Operation.QUANTIZE, (self._tensor(number),), input=x)
        return self._bytes[number]

    def _as_float(self, number: int) -> int:
        if number not in self._floats:
            x = self._bytes[number]
            self._floats[number] = self._append(Operation.DEQUANTIZE, (self._tensor(number),), input=x)
        return self._floats[number]


def read_as_bytes(layers: Iterable[Layer]) -> set[int]:
    """The values that layers on bytes read as such."""
    readers = [layer for layer in layers if objection(layer) is None]
    return {number for layer in readers for number in (layer.reads[:1] if layer.kind is Kind.GATE else layer.reads)}


def packing_of(layer: Layer) -> Callable[[Tensor], Tensor]:
    return partial(pack_taps, stride=layer.stride) if layer.kind is Kind.DEPTHWISE else pack


def quantized_layer(layer: Layer, x_levels: Levels) -> tuple[Tensor, Tensor]:
    """The weight of a layer as :func:`quantized_weight`, with four dimensions."""
    weight, bias = layer.tensors
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    return quantized_weight(weight, bias, x_levels.step, packing_of(layer))
