"""The options, parameters and saved tensors of a chain's forward and backward pass."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor

from biasloss_ext.nn.batch_norm import Norm

NO_CONVOLUTION, POINTWISE, DEPTHWISE = range(3)  # kinds of steps; the first may only begin a chain


class StepOptions(NamedTuple):
    """The options of a step. Activations are numbers of `maps.Activation`."""

    kind: int
    stride: int
    same_padding: bool  # of a depthwise convolution: TensorFlow's
    dilation: int
    activation: int
    excite_activation: int
    gate_activation: int
    norm: Norm
    is_recomputed: bool  # a 1x1 convolution whose result the depthwise one after it recomputes


class Options(NamedTuple):
    """The options of a chain.

    Attributes:
        steps: in order.
        adds_input: whether x is the residual, in place of a tensor of its own.
        returns_statistics: for a caller that moves running statistics itself.
        backend: of every op.
        description: by `chain_replay.description`, of options that serve many calls.
    """

    steps: tuple[StepOptions, ...]
    adds_input: bool
    returns_statistics: bool
    backend: str
    description: Hashable = None


class Weights(NamedTuple):
    """The parameters of a step; None where it has no such part."""

    convolution: Tensor | None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    reduce: Tensor | None = None
    reduce_bias: Tensor | None = None
    excite: Tensor | None = None
    excite_bias: Tensor | None = None


class Saved(NamedTuple):
    """The tensors of a step that backward needs, apart from its parameters.

    `y` is None where it is the input of the chain, or recomputed; then `mean_x` and `weight_gram` are given.
    """

    y: Tensor | None
    statistics: Tensor
    pooled: Tensor | None = None
    gate: Tensor | None = None
    reduced: Tensor | None = None
    expanded: Tensor | None = None
    mean_x: Tensor | None = None
    weight_gram: Tensor | None = None
    total: Tensor | None = None  # values per channel of a normalization over several processes


WEIGHTS, SAVED = len(Weights._fields), len(Saved._fields)


def by_step(kind: Any, tensors: Any) -> tuple[Any, ...]:
    """Group a flat sequence of tensors into one ``kind`` per step."""
    width = len(kind._fields)
    return tuple([kind._make(tensors[start : start + width]) for start in range(0, len(tensors), width)])
