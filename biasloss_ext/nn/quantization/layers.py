"""The layers that a float32 program stands for, one by one: what is measured, then quantized."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise.reference import convolve
from biasloss_ext.ops.program.code import Instruction, Operation
from biasloss_ext.ops.program.vectors import by_outputs

FIRST_NEW = 1 << 20  # the number of the first value that the float32 program does not have; it has fewer


class Kind(enum.Enum):
    """What a layer computes; the value is what reports call it."""

    CONVOLUTION = "1x1 and dense convolutions"
    DEPTHWISE = "depthwise convolutions"
    LINEAR = "linear layers"
    POOL = "pools"
    AVERAGE = "averages"
    GATE = "products with gates"
    NORMALIZE = "normalizations"


class Layer(NamedTuple):
    """``act(layer(input)) + other``, for those that have an activation or add something.

    Attributes:
        kind: of `Kind`.
        output: the number of its value, as those it reads; -1 stands for none.
        input: that of its input.
        other: of the residual; of AVERAGE, of the map that gives the size; of GATE, of the gate.
        tensors: weight and bias of a convolution or linear layer, with all normalizations folded in; the affine of NORMALIZE.
        activation: of the result.
        stride: of a convolution, as the next two.
        same_padding: of a depthwise one.
        padding: of a dense one.
    """

    kind: Kind
    output: int
    input: int
    other: int = -1
    tensors: tuple[Tensor, ...] = ()
    activation: int = maps.IDENTITY
    stride: int = 1
    same_padding: bool = False
    padding: int = 0

    @property
    def reads(self) -> tuple[int, ...]:
        return tuple(number for number in (self.input, self.other) if number >= 0)

    def __call__(self, x: Tensor, other: Tensor | None) -> Tensor:
        """In PyTorch."""
        match self.kind:
            case Kind.CONVOLUTION:
                weight, bias = self.tensors
                y = F.conv2d(x, weight, bias, self.stride, self.padding)
            case Kind.DEPTHWISE:
                weight, bias = self.tensors
                y = convolve(x, weight, self.stride, self.same_padding) + maps.per_channel(bias)
            case Kind.LINEAR:
                y = F.linear(x, *self.tensors)
            case Kind.POOL:
                return x.mean((2, 3))
            case Kind.AVERAGE:
                assert other is not None
                return F.adaptive_avg_pool2d(x, (other.shape[2], other.shape[3]))
            case Kind.GATE:
                assert other is not None
                return x * other[:, :, None, None]
            case Kind.NORMALIZE:
                y = maps.normalized(x, self.tensors[0])
        y = maps.activate(y, self.activation)
        return y if other is None else y + other


def layers_of(instructions: Iterable[Instruction], constants: list[Tensor]) -> list[Layer]:
    """The layers of a float32 program.

    Normalizations that it applies where a map is read become layers, and are folded into the depthwise convolution before;
    a squeeze-and-excitation is two linear layers.
    """
    reader = _Reader(constants)
    for instruction in instructions:
        reader.read(instruction)
    return _folded(reader.layers)


class _Reader:
    def __init__(self, constants: list[Tensor]) -> None:
        self.constants = constants
        self.layers: list[Layer] = []
        self._next = FIRST_NEW
        self._normalized: dict[tuple[int, int, int], int] = {}

    def new(self) -> int:
        self._next += 1
        return self._next - 1

    def add(self, kind: Kind, output: int, input: int, **fields: object) -> int:
        self.layers.append(Layer(kind, output, input, **fields))  # type: ignore[arg-type]
        return output

    def normalized(self, i: Instruction, affine: Tensor | None) -> int:
        """The number of the input with the normalization that is applied on load."""
        if not i.on_load or affine is None:
            return i.input
        key = (i.input, affine.data_ptr(), i.activation)
        if key not in self._normalized:
            layer = {"tensors": (affine,), "activation": i.activation}
            self._normalized[key] = self.add(Kind.NORMALIZE, self.new(), i.input, **layer)
        return self._normalized[key]

    def read(self, i: Instruction) -> None:
        own = self.constants[i.constants :]
        match i.operation:
            case Operation.EXPAND_DEPTHWISE:
                _, affine, weight, y_affine = own[:4]
                expand = by_outputs(own[0], weight.shape[0])
                hidden = self.add(Kind.CONVOLUTION, self.new(), i.input, **_with_norm(expand, affine, i.activation))
                self.add(
                    Kind.DEPTHWISE,
                    i.output,
                    hidden,
                    stride=i.stride,
                    same_padding=bool(i.same_padding),
                    **_with_norm(weight, y_affine, i.output_activation),
                )
                if i.pooled >= 0:
                    self.add(Kind.POOL, i.pooled, i.output)
            case Operation.DEPTHWISE:
                x, weight = self.normalized(i, own[1] if i.on_load else None), own[0]
                tensors = (weight, weight.new_zeros(weight.shape[0]))
                self.add(
                    Kind.DEPTHWISE, i.output, x, tensors=tensors, stride=i.stride, same_padding=bool(i.same_padding)
                )
            case Operation.POINTWISE:
                x = self.normalized(i, own[2] if i.on_load else None)
                if i.gate >= 0:
                    x = self.add(Kind.GATE, self.new(), x, other=i.gate)
                tensors = (by_outputs(own[0], own[1].shape[0]), own[1])
                convolution = {"tensors": tensors, "activation": i.output_activation, "other": i.other}
                self.add(Kind.CONVOLUTION, i.output, x, **convolution)
            case Operation.POOL:
                self.add(Kind.POOL, i.output, self.normalized(i, own[0] if i.on_load else None))
            case Operation.SQUEEZE_EXCITE:
                hidden = self.add(Kind.LINEAR, self.new(), i.input, tensors=tuple(own[:2]), activation=i.activation)
                self.add(Kind.LINEAR, i.output, hidden, tensors=tuple(own[2:4]), activation=i.output_activation)
            case Operation.NORMALIZE:
                fields = {"tensors": (own[0],), "activation": i.activation, "other": i.other}
                self.add(Kind.NORMALIZE, i.output, i.input, **fields)
            case Operation.CONVOLUTION:
                geometry = {"stride": i.stride, "padding": i.padding, "activation": i.output_activation}
                self.add(Kind.CONVOLUTION, i.output, i.input, tensors=(own[0], own[1]), **geometry)
            case Operation.LINEAR:
                fields = {"tensors": (own[0], own[1]), "activation": i.output_activation}
                self.add(Kind.LINEAR, i.output, i.input, **fields)
            case Operation.AVERAGE:
                self.add(Kind.AVERAGE, i.output, i.input, other=i.other)
            case _:
                raise AssertionError(f"no float32 instruction: {i.operation}")


def _with_norm(weight: Tensor, affine: Tensor, activation: int) -> dict[str, object]:
    scale, shift = affine
    return {"tensors": (weight * scale[:, None, None, None], shift), "activation": activation}


def _folded(layers: list[Layer]) -> list[Layer]:
    """With each normalization folded into the convolution before it, where nothing else reads that."""
    readers: dict[int, int] = {}
    for layer in layers:
        for number in layer.reads:
            readers[number] = readers.get(number, 0) + 1
    folded: list[Layer] = []
    for layer in layers:
        before = next((index for index, each in enumerate(folded) if each.output == layer.input), None)
        if layer.kind is not Kind.NORMALIZE or before is None or readers[layer.input] > 1 or layer.other >= 0:
            folded.append(layer)
            continue
        previous = folded[before]
        is_plain = previous.activation == maps.IDENTITY and previous.other < 0
        if previous.kind not in (Kind.CONVOLUTION, Kind.DEPTHWISE) or not is_plain:
            folded.append(layer)
            continue
        (scale, shift), (weight, bias) = layer.tensors[0], previous.tensors
        tensors = (weight * scale[:, None, None, None], torch.addcmul(shift, bias, scale))
        folded[before] = previous._replace(output=layer.output, tensors=tensors, activation=layer.activation)
    return folded
