"""Floating-point operations of the ops, for `torch.utils.flop_counter.FlopCounterMode`. As PyTorch does, the formulas count
two per multiply-add of a convolution, and nothing for recomputation, activations and normalizations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from biasloss_ext.ops.expand_depthwise import reference as expand_depthwise
from biasloss_ext.ops.registry import OPS
from biasloss_ext.when_imported import when_imported

Shape = tuple[int, ...]


def _positions(shape: Shape, stride: int = 1) -> int:
    samples, _, height, width = shape
    return samples * -(-height // stride) * -(-width // stride)


def _depthwise(x: Shape, weight: Shape, *_: Any, stride: int = 1, **__: Any) -> int:
    channels, _one, height, width = weight
    return 2 * _positions(x, stride) * channels * height * width


def _depthwise_backward(
    x: Shape, weight: Shape, *_: Any, stride: int = 1, want_x: bool = True, want_weight: bool = True, **__: Any
) -> int:
    return (want_x + want_weight) * _depthwise(x, weight, stride=stride)


def _pointwise(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * _positions(x) * weight[0] * weight[1]


def _pointwise_backward(
    grad: Shape, x: Shape, weight: Shape, *_: Any, want_x: bool = True, want_weight: bool = True, **__: Any
) -> int:
    return (want_x + want_weight) * _pointwise(x, weight)


def _expand_depthwise(
    x: Shape, expand: Shape, affine: Shape, weight: Shape, *_: Any, stride: int = 1, **__: Any
) -> int:
    return _pointwise(x, expand) + _depthwise(x, weight, stride=stride)


def _expand_depthwise_backward(*shapes: Shape, stride: int = 1, **_: Any) -> int:
    of: Any = expand_depthwise.BackwardArguments(*shapes)  # type: ignore[arg-type]  # shapes in place of tensors
    return 2 * _expand_depthwise(of.x, of.expand_weight, of.affine, of.weight, stride=stride)


FORMULAS: dict[str, Callable[..., int]] = {
    "depthwise": _depthwise,
    "depthwise_backward": _depthwise_backward,
    "pointwise": _pointwise,
    "pointwise_backward": _pointwise_backward,
    "expand_depthwise": _expand_depthwise,
    "expand_depthwise_activate": _expand_depthwise,
    "expand_depthwise_backward": _expand_depthwise_backward,
}


COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Tell PyTorch's counter, now or when it is imported: importing it here would import much, Triton too."""
    packets = {
        overload._overloadpacket: formula
        for name, formula in FORMULAS.items()
        for overload in (OPS[name].native, OPS[name].triton)
        if overload is not None
    }

    def add_formulas() -> None:
        register_flop_formula = sys.modules[COUNTER].register_flop_formula
        for packet, formula in packets.items():
            register_flop_formula(packet)(formula)

    when_imported(COUNTER, add_formulas)
