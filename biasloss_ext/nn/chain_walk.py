"""The order in which a prepared chain is computed, for whatever computes it: ops now, or a program later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from biasloss_ext.nn.chain_parts import DEPTHWISE, POINTWISE
from biasloss_ext.ops import maps

if TYPE_CHECKING:
    from biasloss_ext.nn.inference_block import PreparedGate, PreparedStep

Value = TypeVar("Value")


class OnLoad(NamedTuple):
    """The normalization, activation and gate that the next operation applies to the map that it loads."""

    affine: Tensor | None = None
    activation: int = maps.IDENTITY
    gate: Any = None  # a value of the same kind as the map


NOTHING = OnLoad()


class Operations(Protocol[Value]):
    """The operations of a chain's steps, on values of some kind."""

    def can_recompute(self, x: Value) -> bool:
        """Whether an expansion of ``x`` and the depthwise convolution after it are one operation."""

    def expand_depthwise(self, x: Value, step: PreparedStep, after: PreparedStep) -> tuple[Value, Value | None]:
        """The map, and its pool where a gate needs it."""

    def pointwise(self, x: Value, step: PreparedStep, on_load: OnLoad, residual: Value | None) -> Value: ...
    def depthwise(self, x: Value, step: PreparedStep, on_load: OnLoad) -> Value: ...
    def pool(self, x: Value, on_load: OnLoad) -> Value: ...
    def gate(self, pooled: Value, gate: PreparedGate) -> Value: ...
    def normalize(self, x: Value, on_load: OnLoad, residual: Value | None) -> Value: ...
    def add(self, x: Value, residual: Value) -> Value: ...


def walk(steps: Sequence[PreparedStep], run: Operations[Value], x: Value, residual: Value | None) -> Value:
    """The result of a chain: one operation per step, one for an expansion and the depthwise convolution after it."""
    on_load = NOTHING
    index = 0
    while index < len(steps):
        step, is_last = steps[index], index == len(steps) - 1
        after = None if is_last else steps[index + 1]
        pooled = None
        if after is not None and on_load is NOTHING and _are_one(step, after) and run.can_recompute(x):
            x, pooled = run.expand_depthwise(x, step, after)
            step, index = after, index + 1
        elif step.kind == POINTWISE:
            x = run.pointwise(x, step, on_load, residual if is_last else None)
            on_load, residual = NOTHING, None if is_last else residual
        else:
            if step.kind == DEPTHWISE:
                x = run.depthwise(x, step, on_load)
            on_load = OnLoad(step.affine, step.activation)
        if step.gate is not None:
            pooled = run.pool(x, on_load) if pooled is None else pooled
            on_load = OnLoad(on_load.affine, on_load.activation, run.gate(pooled, step.gate))
        index += 1
    if on_load.affine is not None:
        return run.normalize(x, on_load, residual)
    return x if residual is None else run.add(x, residual)


def _are_one(step: PreparedStep, after: PreparedStep) -> bool:
    return (step.kind, after.kind) == (POINTWISE, DEPTHWISE) and step.gate is None and after.dilation == 1
