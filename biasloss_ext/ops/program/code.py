"""The instructions of a program."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Operation(enum.IntEnum):
    """What an instruction computes, and the constants that it takes one after another.

    The first six are the ops of the same names; weights of 1x1 convolutions may be as `by_vectors` makes them. A program has
    float32 or float64 maps where it has one of the next three. Those from QUANTIZE on are described in `quantized`, their
    weights in `packing`.
    """

    EXPAND_DEPTHWISE = 0  # expand_depthwise_activate: expand_weight, affine, weight, y_affine
    DEPTHWISE = 1  # weight, then affine where it is on load
    POINTWISE = 2  # weight, bias, then affine where it is on load; ``other`` is the residual
    POOL = 3  # pool_variance without the variance: affine where it is on load
    SQUEEZE_EXCITE = 4  # reduce_weight, reduce_bias, expand_weight, expand_bias; output_activation is the gate's
    NORMALIZE = 5  # batch_norm_apply: affine; ``other`` is the residual
    CONVOLUTION = 6  # a dense convolution: weight, as `packed_kernel` makes it, and bias
    LINEAR = 7  # weight, bias
    AVERAGE = 8  # F.adaptive_avg_pool2d to the size of ``other``
    RELEASE = 9  # frees the input, which is not read again
    QUANTIZE = 10  # levels
    DEQUANTIZE = 11  # levels
    QUANTIZED_CONVOLUTION = (
        12  # 1x1, dense or linear: weight, bias, scale, levels of x, of the result, of the residual ``other``
    )
    QUANTIZED_DEPTHWISE = 13  # the same
    QUANTIZED_POOL = 14  # levels
    QUANTIZED_AVERAGE = 15  # as AVERAGE
    QUANTIZED_GATE = 16  # levels of x and of the result


class Instruction(NamedTuple):
    """A row of the code. Values are numbered, 0 is the input of the program; -1 stands for none.

    Attributes:
        operation: of `Operation`.
        output: the number of the result.
        pooled: of EXPAND_DEPTHWISE, the number of the mean over positions; -1 where it is not wanted.
        input: the number of the value that is read.
        other: of a second one.
        gate: of POINTWISE, the number of the gate on load.
        constants: the index of the first constant.
        on_load: whether a normalization and ``activation`` are applied on load.
        activation: on load; of EXPAND_DEPTHWISE, of the expanded map; of SQUEEZE_EXCITE, of the hidden layer.
        output_activation: of the result.
        stride: of a convolution.
        same_padding: of a depthwise convolution, as in `depthwise`.
        padding: of a dense convolution, on each side.
        kernel: of a quantized convolution.
        outputs: of the same, its channels.
    """

    operation: int
    output: int = -1
    pooled: int = -1
    input: int = 0
    other: int = -1
    gate: int = -1
    constants: int = 0
    on_load: int = 0
    activation: int = 0
    output_activation: int = 0
    stride: int = 1
    same_padding: int = 0
    padding: int = 0
    kernel: int = 1
    outputs: int = 0


FIELDS = len(Instruction._fields)


def instructions(code: list[int]) -> list[Instruction]:
    """The rows of the code.

    Raises:
        ValueError: its length is no multiple of that of a row.
    """
    if not code or len(code) % FIELDS:
        raise ValueError(f"program: code: expected rows of {FIELDS} integers, got {len(code)} integers")
    return [Instruction(*code[at : at + FIELDS]) for at in range(0, len(code), FIELDS)]
