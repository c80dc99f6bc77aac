"""Writes the code of a program: the constants and instructions of layers, one after another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biasloss_ext.nn.chain_walk import OnLoad, walk
from biasloss_ext.nn.inference_block import COLUMNS, PreparedChain, PreparedGate, PreparedStep
from biasloss_ext.ops import maps
from biasloss_ext.ops.program.code import Instruction, Operation
from biasloss_ext.ops.program.vectors import by_vectors

MOST_STEM_CHANNELS = 4  # of the input of a dense convolution larger than 1x1


class Unsupported(Exception):
    """A layer that a program cannot compute."""


class Value(NamedTuple):
    """A value of a program.

    Attributes:
        number: as the instructions call it.
        channels: of its shape; None of the input, as long as no layer has told.
        rank: the dimensions that it has for the network: 4 of a map, 2 of a matrix.
        is_pooled: whether the program keeps it as a matrix, whatever its rank.
    """

    number: int
    channels: int | None
    rank: int = 4
    is_pooled: bool = False


def packed_kernel(weight: Tensor) -> Tensor:
    """A (K, C, k, k) weight as a view of (k, k, C, K) memory, by column, row and channel, whose rows are padded with zeros."""
    outputs, inputs, rows, columns = weight.shape
    memory = weight.new_zeros(columns, rows, inputs, (outputs + COLUMNS - 1) // COLUMNS * COLUMNS)
    memory[..., :outputs] = weight.permute(3, 2, 1, 0)
    return memory[..., :outputs].permute(3, 2, 1, 0)


class Writer:
    """Collects the instructions of a program, and the tensors that they read.

    Attributes:
        instructions: in order.
        constants: in order; those of an instruction one after another.
        input_channels: that the layers which read the input expect.
        any_convolution: whether dense convolutions of many channels are written, too, which are faster in PyTorch.
    """

    def __init__(self, dtype: torch.dtype, any_convolution: bool = False) -> None:
        self.dtype, self.any_convolution = dtype, any_convolution
        self.input_channels: int | None = None
        self.instructions: list[Instruction] = []
        self.constants: list[Tensor] = []
        self._values = 1

    def value(self) -> int:
        self._values += 1
        return self._values - 1

    def write(
        self, operation: Operation, x: Value, channels: int | None, constants: tuple[Tensor, ...], **fields: Any
    ) -> Value:
        """Append an instruction that reads ``x``; its result has so many channels, and the shape of x otherwise."""
        for constant in constants:
            if constant.dtype is not self.dtype:
                raise Unsupported(f"a parameter is {constant.dtype}, not {self.dtype}")
        output, first = self.value(), len(self.constants)
        self.constants += [constant.detach() for constant in constants]
        self.instructions.append(Instruction(int(operation), output, input=x.number, constants=first, **fields))
        return x._replace(number=output, channels=channels)

    def chain(self, chain: PreparedChain, x: Value, residual: Value | None) -> Value:
        """As `PreparedChain` computes it."""
        if chain.skips > 1:
            raise Unsupported("a 1x1 convolution has a stride")
        x = self._map(x, chain.channels)
        return walk(chain.steps, _ChainWriter(self), x, residual)

    def convolution(
        self, convolution: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: Value, activation: int
    ) -> Value:
        """A dense convolution by these values instead of its own."""
        kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
        is_plain = convolution.groups == 1 and convolution.padding_mode == "zeros" and convolution.dilation == (1, 1)
        is_square = all(isinstance(pair, tuple) and pair[0] == pair[1] for pair in (kernel, stride, padding))
        if not is_plain or not is_square:
            raise Unsupported("a convolution is grouped, dilated, not square, or not padded with zeros")
        if int(padding[0]) >= kernel[0]:
            raise Unsupported("a convolution pads by its kernel or more")
        outputs, is_pointwise = weight.shape[0], (kernel[0], stride[0], padding[0]) == (1, 1, 0)
        bias = weight.new_zeros(outputs) if bias is None else bias
        if x.is_pooled:
            if not is_pointwise or x.rank != 4:
                raise Unsupported("a convolution of a map of one position")
            return self._linear(weight.flatten(1).contiguous(), bias, x, activation)
        if is_pointwise:
            return self.pointwise(weight, bias, x, activation)
        if convolution.in_channels > MOST_STEM_CHANNELS and not self.any_convolution:
            raise Unsupported("PyTorch's dense convolutions are faster but for a few channels")
        x = self._map(x, convolution.in_channels)
        geometry = {"stride": stride[0], "padding": int(padding[0]), "output_activation": activation}
        return self.write(Operation.CONVOLUTION, x, outputs, (packed_kernel(weight), bias), **geometry)

    def pointwise(self, weight: Tensor, bias: Tensor, x: Value, activation: int) -> Value:
        """A 1x1 convolution."""
        x = self._map(x, weight.shape[1])
        constants = (by_vectors(weight), bias)
        return self.write(Operation.POINTWISE, x, weight.shape[0], constants, output_activation=activation)

    def linear(self, layer: nn.Linear, x: Value) -> Value:
        if not x.is_pooled or x.rank != 2 or not layer.weight.is_contiguous():
            raise Unsupported("a linear layer of something else than a matrix")
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        return self._linear(layer.weight, bias, x, maps.IDENTITY)

    def _linear(self, weight: Tensor, bias: Tensor, x: Value, activation: int) -> Value:
        return self.write(Operation.LINEAR, x, weight.shape[0], (weight, bias), output_activation=activation)

    def pool(self, x: Value, rank: int) -> Value:
        x = self._map(x, x.channels)
        return self.write(Operation.POOL, x, x.channels, ())._replace(rank=rank, is_pooled=True)

    def average(self, x: Value, like: Value) -> Value:
        return self.write(Operation.AVERAGE, x, x.channels, (), other=like.number)

    def normalize(self, affine: Tensor, activation: int, x: Value) -> Value:
        """A normalization with constant statistics; folded into the linear layer before a pooled map."""
        if not x.is_pooled:
            x = self._map(x, affine.shape[1])
            return self.write(Operation.NORMALIZE, x, x.channels, (affine,), activation=activation)
        last = self._last(x)
        if last.operation != Operation.LINEAR:
            raise Unsupported("a normalization of a map of one position")
        (scale, shift), first = affine, last.constants
        weight, bias = self.constants[first : first + 2]
        self.constants[first : first + 2] = [weight * scale[:, None], bias * scale + shift]
        self.instructions[-1] = last._replace(output_activation=activation)
        return x

    def activate(self, x: Value, activation: int) -> Value:
        """An activation of the result of the last instruction, which is read by nothing else."""
        if activation in (maps.GELU, maps.GELU_TANH):
            raise Unsupported("PyTorch's GELU is faster")
        if activation != maps.IDENTITY:
            last = self._last(x)
            if last.operation not in (Operation.POINTWISE, Operation.CONVOLUTION, Operation.LINEAR) or last.other >= 0:
                raise Unsupported("an activation of what is no convolution")
            self.instructions[-1] = last._replace(output_activation=activation)
        return x

    def _last(self, x: Value) -> Instruction:
        """The instruction that makes ``x``, where nothing has been applied to it."""
        last = self.instructions[-1] if self.instructions else None
        if last is None or last.output != x.number or last.output_activation != maps.IDENTITY:
            raise Unsupported("an operation of what the last instruction did not make")
        return last

    def _map(self, x: Value, channels: int | None) -> Value:
        """``x`` as a map of so many channels."""
        if x.number == 0 and self.input_channels is None:
            self.input_channels = channels
        known = self.input_channels if x.number == 0 else x.channels
        if x.is_pooled or x.rank != 4 or known is None or known != channels:
            raise Unsupported(f"a layer expects a map of {channels} channels, got {known}")
        return x._replace(channels=known)

    def code(self) -> list[int]:
        """The instructions, each followed by the release of what nothing reads after it."""
        last_reader = {
            number: index
            for index, i in enumerate(self.instructions)
            for number in (i.input, i.other, i.gate)
            if number >= 0
        }
        rows: list[Instruction] = []
        for index, instruction in enumerate(self.instructions):
            rows.append(instruction)
            dead = sorted(number for number, reader in last_reader.items() if reader == index)
            rows += [Instruction(int(Operation.RELEASE), input=number) for number in dead]
        return [field for row in rows for field in row]


class _ChainWriter:
    """The operations of a chain, written as instructions."""

    def __init__(self, writer: Writer) -> None:
        self.value, self.write = writer.value, writer.write

    def can_recompute(self, x: Value) -> bool:
        return True

    def expand_depthwise(self, x: Value, step: PreparedStep, after: PreparedStep) -> tuple[Value, Value | None]:
        assert step.expand is not None and after.taps is not None
        channels = after.taps.shape[0]
        pooled = None if after.gate is None else Value(self.value(), channels)
        y = self.write(
            Operation.EXPAND_DEPTHWISE,
            x,
            channels,
            (by_vectors(step.expand), step.affine, after.taps, after.affine),
            activation=step.activation,
            output_activation=after.activation,
            stride=after.stride,
            same_padding=int(after.same_padding),
            pooled=_number(pooled),
        )
        return y, pooled

    def pointwise(self, x: Value, step: PreparedStep, on_load: OnLoad, residual: Value | None) -> Value:
        assert step.weight is not None and step.bias is not None
        affines, fields = _loaded(on_load)
        constants = (by_vectors(step.weight), step.bias, *affines)
        fields.update(output_activation=step.activation, gate=_number(on_load.gate), other=_number(residual))
        return self.write(Operation.POINTWISE, x, step.weight.shape[0], constants, **fields)

    def depthwise(self, x: Value, step: PreparedStep, on_load: OnLoad) -> Value:
        assert step.weight is not None
        if step.dilation > 1:
            raise Unsupported("a depthwise convolution is dilated")
        affines, fields = _loaded(on_load)
        fields.update(stride=step.stride, same_padding=int(step.same_padding))
        return self.write(Operation.DEPTHWISE, x, x.channels, (step.weight, *affines), **fields)

    def pool(self, x: Value, on_load: OnLoad) -> Value:
        affines, fields = _loaded(on_load)
        return self.write(Operation.POOL, x, x.channels, affines, **fields)

    def gate(self, pooled: Value, gate: PreparedGate) -> Value:
        activations = {"activation": gate.activation, "output_activation": gate.gate_activation}
        return self.write(Operation.SQUEEZE_EXCITE, pooled, pooled.channels, gate.tensors, **activations)

    def normalize(self, x: Value, on_load: OnLoad, residual: Value | None) -> Value:
        affines, _ = _loaded(on_load)
        added = _number(residual)
        return self.write(Operation.NORMALIZE, x, x.channels, affines, activation=on_load.activation, other=added)

    def add(self, x: Value, residual: Value) -> Value:
        raise Unsupported("something is added to a map that no kernel writes")


def _loaded(on_load: OnLoad) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The constants and the fields of what an instruction applies to its input."""
    affines = () if on_load.affine is None else (on_load.affine,)
    return affines, {"on_load": len(affines), "activation": on_load.activation}


def _number(value: Value | None) -> int:
    return -1 if value is None else value.number
