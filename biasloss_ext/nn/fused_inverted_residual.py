"""The blocks of SkipblockNet on the fused ops: same parameters, names and checkpoints as the plain ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from biasloss_ext.nn.fused_block import (
    ACTIVATIONS,
    Fused,
    Gate,
    Parts,
    fused_block,
    takes_fused_path,
    why_not_fusable,
)
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.nn.members import child, children, parameter
from biasloss_ext.nn.pooling import average_to
from biasloss_ext.nn.skip_block import SkipBlock
from biasloss_ext.nn.squeeze_excite import SqueezeExcite


def parts_of(layers: nn.Sequential) -> Parts | str:
    """The parts of the sequence that `InvertedResidual.conv` and `SkipBlock.core_block` are, or why they have no fused
    kernels. Looked at in each call, as the layers may have been exchanged."""
    modules = children(layers)
    if len(modules) not in (8, 9):
        return f"it has {len(modules)} layers, expected 8, or 9 with an attention"
    expand, expand_norm, first, depthwise, depthwise_norm, second, *rest = modules
    *gates, project, project_norm = rest
    for activation in (first, second):
        if type(activation) not in ACTIVATIONS:
            return f"the activation is {type(activation).__name__}"
    gate: Gate | None = None
    others: tuple[nn.Module, ...] = (layers, first, second)
    for module in gates:
        if type(module) is nn.Identity:  # in the place of an attention
            others = (*others, module)
            continue
        found = gate_of(module)
        if isinstance(found, str):
            return found
        gate = found
        layers_of_gate = child(module, "fc")
        others = (*others, module, *children(layers_of_gate), layers_of_gate)
    parts = Parts(
        expand,  # type: ignore[arg-type]
        expand_norm,  # type: ignore[arg-type]
        ACTIVATIONS[type(first)],
        depthwise,  # type: ignore[arg-type]
        depthwise_norm,  # type: ignore[arg-type]
        ACTIVATIONS[type(second)],
        gate,
        project,  # type: ignore[arg-type]
        project_norm,  # type: ignore[arg-type]
        others,
    )
    return _why_not_plain_norms(parts) or why_not_fusable(parts) or parts


def _why_not_plain_norms(parts: Parts) -> str | None:
    for norm in (parts.expand_norm, parts.depthwise_norm, parts.project_norm):
        if isinstance(norm, nn.BatchNorm2d) and type(norm) is not nn.BatchNorm2d:
            return f"{type(norm).__name__} may compute something else than BatchNorm2d"
    return None


def gate_of(module: nn.Module) -> Gate | str:
    """The parts of a `SqueezeExcite`, or why it has no fused kernels."""
    if type(module) is not SqueezeExcite:
        return f"the attention is {type(module).__name__}"
    layers = children(child(module, "fc"))
    kinds = [type(layer) for layer in layers]
    if len(layers) != 4 or kinds[0] is not nn.Linear or kinds[2] is not nn.Linear:
        return f"the attention is made of {', '.join(kind.__name__ for kind in kinds)}"
    reduce, activation, excite, gate = layers
    for kind in (type(activation), type(gate)):
        if kind not in ACTIVATIONS:
            return f"the activation of the attention is {kind.__name__}"
    if parameter(reduce, "bias") is None or parameter(excite, "bias") is None:
        return "a layer of the attention has no bias"
    return Gate(reduce, excite, ACTIVATIONS[type(activation)], ACTIVATIONS[type(gate)])  # type: ignore[arg-type]


def check_fused(fused: Fused, layers: nn.Sequential, name: str) -> Fused:
    """``fused`` itself; a ValueError where it is no choice, or True for layers without fused kernels."""
    if fused not in ("auto", True, False):
        raise ValueError(f"fused must be 'auto', True or False, got {fused!r}")
    found = parts_of(layers)
    if isinstance(found, str) and fused is True:
        raise ValueError(f"{name} has no fused kernels: {found}; fused='auto' takes the plain layers instead")
    return fused


class FusedInvertedResidual(InvertedResidual):
    """`InvertedResidual` on the fused ops; saves its input, y2, y3 and per-channel values for backward, see
    `nn.block_function`.

    Args:
        fused: "auto" takes the plain layers where no kernels can run or a graph is exported; True raises instead.
        The others are those of `InvertedResidual`.

    Raises:
        ValueError: `fused` is True, and kernel size, stride or activation have no fused kernels.
        RuntimeError, in the call: `fused` is True, and no kernels can run on the input, with the reason.
    """

    def __init__(self, *arguments: Any, fused: Fused = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fused = check_fused(fused, self.conv, type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        parts = parts_of(child(self, "conv"))
        if isinstance(parts, str) or not takes_fused_path(x, self.fused, None, type(self).__name__):
            return super().forward(x)
        return fused_block(x, parts, x if self.has_residual else None)


class FusedSkipBlock(SkipBlock):
    """`SkipBlock` on the fused ops; arguments and errors as of `FusedInvertedResidual`."""

    def __init__(self, *arguments: Any, fused: Fused = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fused = check_fused(fused, self.core_block, type(self).__name__)

    def forward(self, early: Tensor, later: Tensor) -> Tensor:
        parts = parts_of(child(self, "core_block"))
        if isinstance(parts, str) or not takes_fused_path(early, self.fused, None, type(self).__name__):
            return super().forward(early, later)
        pooled = average_to(early, (later.shape[-2], later.shape[-1]))
        return fused_block(pooled, parts, later)
