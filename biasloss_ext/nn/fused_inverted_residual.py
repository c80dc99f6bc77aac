"""The blocks of SkipblockNet on the fused ops: same parameters, names and checkpoints as the plain ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

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
from biasloss_ext.nn.skip_block import SkipBlock
from biasloss_ext.nn.squeeze_excite import SqueezeExcite
from biasloss_ext.ops import maps


def parts_of(layers: nn.Sequential) -> Parts:
    """The parts of the sequence that `InvertedResidual.conv` and `SkipBlock.core_block` are."""
    expand, expand_norm, first, depthwise, depthwise_norm, second, *rest = layers
    *gates, project, project_norm = rest
    gate = next((gate_of(module) for module in gates if isinstance(module, SqueezeExcite)), None)
    return Parts(
        expand,  # type: ignore[arg-type]
        expand_norm,  # type: ignore[arg-type]
        ACTIVATIONS[type(first)],
        depthwise,  # type: ignore[arg-type]
        depthwise_norm,  # type: ignore[arg-type]
        ACTIVATIONS[type(second)],
        gate,
        project,  # type: ignore[arg-type]
        project_norm,  # type: ignore[arg-type]
    )


def gate_of(module: SqueezeExcite) -> Gate:
    reduce, _, excite, _ = module.fc
    return Gate(reduce, excite, maps.RELU, maps.HARDSIGMOID)  # type: ignore[arg-type]


def objection_to(layers: nn.Sequential) -> str | None:
    """Why the layers have no fused kernels, or None. Asked at each call: a converted normalisation is another module."""
    unknown = [type(layers[i]).__name__ for i in (2, 5) if type(layers[i]) not in ACTIVATIONS]
    return f"the activation is {unknown[0]}" if unknown else why_not_fusable(parts_of(layers))


def check_fused(fused: Fused, layers: nn.Sequential, name: str) -> Fused:
    """``fused`` itself; a ValueError where it is no choice, or True for layers without fused kernels."""
    if fused not in ("auto", True, False):
        raise ValueError(f"fused must be 'auto', True or False, got {fused!r}")
    objection = objection_to(layers)
    if objection is not None and fused is True:
        raise ValueError(f"{name} has no fused kernels: {objection}; fused='auto' takes the plain layers instead")
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
        if not takes_fused_path(x, self.fused, objection_to(self.conv), type(self).__name__):
            return super().forward(x)
        return fused_block(x, parts_of(self.conv), x if self.has_residual else None)


class FusedSkipBlock(SkipBlock):
    """`SkipBlock` on the fused ops; arguments and errors as of `FusedInvertedResidual`."""

    def __init__(self, *arguments: Any, fused: Fused = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fused = check_fused(fused, self.core_block, type(self).__name__)

    def forward(self, early: Tensor, later: Tensor) -> Tensor:
        if not takes_fused_path(early, self.fused, objection_to(self.core_block), type(self).__name__):
            return super().forward(early, later)
        pooled = F.adaptive_avg_pool2d(early, (later.shape[-2], later.shape[-1]))
        return fused_block(pooled, parts_of(self.core_block), later)
