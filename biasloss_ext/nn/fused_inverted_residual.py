"""The blocks of SkipblockNet on the fused ops, with the parameters, names and checkpoints of the plain blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.nn.activations import number_of
from biasloss_ext.nn.chain import Chain, Gate, Step, why_not_fusable
from biasloss_ext.nn.chain_parts import DEPTHWISE, POINTWISE
from biasloss_ext.nn.fused_chain import Fused, takes_fused_path
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.nn.members import child, children
from biasloss_ext.nn.pooling import average_to
from biasloss_ext.nn.ready_chain import ReadyChain
from biasloss_ext.nn.scripting import NotScriptable
from biasloss_ext.nn.skip_block import SkipBlock
from biasloss_ext.nn.squeeze_excite import SqueezeExcite

EXACT_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def chain_of(layers: nn.Sequential) -> Chain | str:
    """The chain of the sequence in `InvertedResidual.conv` or `SkipBlock.core_block`, or why it has no fused kernels. Asked in
    each call, as the layers may have been exchanged."""
    modules = children(layers)
    if len(modules) not in (8, 9):
        return f"it has {len(modules)} layers, expected 8, or 9 with an attention"
    expand, expand_norm, first, depthwise, depthwise_norm, second, *gates, project, project_norm = modules
    numbers = _numbers_of("activation", first, second)
    if isinstance(numbers, str):
        return numbers
    for norm in (expand_norm, depthwise_norm, project_norm):
        if type(norm) not in EXACT_NORMS:
            return f"{type(norm).__name__} may compute something else than BatchNorm2d"
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
    steps = (
        Step(expand, expand_norm, numbers[0]),
        Step(depthwise, depthwise_norm, numbers[1], gate),
        Step(project, project_norm),
    )
    chain = Chain(steps, others)
    return _why_not_in_place(chain) or why_not_fusable(chain) or chain


def _why_not_in_place(chain: Chain) -> str | None:
    """Why a layer is not of the kind that its place requires, or None."""
    kinds = [POINTWISE, DEPTHWISE, POINTWISE]
    for step, kind in zip(chain.steps, kinds, strict=True):
        if not isinstance(step.convolution, nn.Conv2d):
            return f"{type(step.convolution).__name__} stands where a Conv2d is expected"
        if step.kind != kind:
            return "a convolution is grouped otherwise than in the block of that name"
    return None


def _numbers_of(name: str, *layers: nn.Module) -> list[int] | str:
    """The numbers of activations, or why one of them has no fused kernels."""
    numbers = []
    for layer in layers:
        number = number_of(layer)
        if number is None:
            return f"the {name} is {type(layer).__name__}"
        numbers.append(number)
    return numbers


def gate_of(module: nn.Module) -> Gate | str:
    """The parts of a `SqueezeExcite`, or the reason why it has no fused kernels."""
    if type(module) is not SqueezeExcite:
        return f"the attention is {type(module).__name__}"
    layers = children(child(module, "fc"))
    kinds = [type(layer) for layer in layers]
    if len(layers) != 4 or kinds[0] is not nn.Linear or kinds[2] is not nn.Linear:
        return f"the attention is made of {', '.join(kind.__name__ for kind in kinds)}"
    reduce, activation, excite, gate = layers
    numbers = _numbers_of("activation of the attention", activation, gate)
    if isinstance(numbers, str):
        return numbers
    return Gate(reduce, excite, *numbers)


def check_fused(fused: Fused, layers: nn.Sequential, name: str) -> Fused:
    """``fused`` itself; raises a ValueError if it is not a choice, or if it is True for layers without fused kernels."""
    if fused not in ("auto", True, False):
        raise ValueError(f"fused must be 'auto', True or False, got {fused!r}")
    found = chain_of(layers)
    if isinstance(found, str) and fused is True:
        raise ValueError(f"{name} has no fused kernels: {found}; fused='auto' uses the plain layers instead")
    return fused


class _OneChain(NotScriptable):
    """A block of one chain, which is searched for again when its layers have changed."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the chain: a copy finds its own, of its own layers."""
        return {name: value for name, value in self.__dict__.items() if name != "_ready"}

    def ready_chain(self, layers: nn.Sequential) -> ReadyChain | str:
        """The chain of the layers as they are now, or why they have no fused kernels."""
        compiles = torch.compiler.is_compiling()
        ready: ReadyChain | None = None if compiles else self.__dict__.get("_ready")
        if ready is not None and ready.chain.others[0] is layers and ready.holds():
            return ready
        found = chain_of(layers)
        if isinstance(found, str):
            return found
        ready = ReadyChain(found)
        if compiles:
            return ready
        self.__dict__["_ready"] = ready
        return ready.objection() or ready


class FusedInvertedResidual(_OneChain, InvertedResidual):
    """`InvertedResidual` on the fused ops, with the same parameters and results.

    For the backward pass it saves its input, y2, y3 and values per channel, see `nn.chain_function`. The other arguments
    are those of `InvertedResidual`.

    Args:
        fused: "auto" uses the plain layers if no kernels can run or a graph is exported; True raises instead; False always
            uses the plain layers.

    Raises:
        ValueError: ``fused`` is True, and kernel size, stride or activation have no fused kernels.
        RuntimeError: in a call, if ``fused`` is True and no kernels can run on the input; the message has the reason.
    """

    def __init__(self, *arguments: Any, fused: Fused = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fused = check_fused(fused, self.conv, type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        chain = self.ready_chain(child(self, "conv"))
        if isinstance(chain, str) or not takes_fused_path(x, self.fused, None, type(self).__name__):
            return super().forward(x)
        return chain.run(x, x if self.has_residual else None)


class FusedSkipBlock(_OneChain, SkipBlock):
    """`SkipBlock` on the fused ops. ``fused`` and the errors are those of `FusedInvertedResidual`; the rest is `SkipBlock`'s."""

    def __init__(self, *arguments: Any, fused: Fused = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fused = check_fused(fused, self.core_block, type(self).__name__)

    def forward(self, early: Tensor, later: Tensor) -> Tensor:
        chain = self.ready_chain(child(self, "core_block"))
        if isinstance(chain, str) or not takes_fused_path(early, self.fused, None, type(self).__name__):
            return super().forward(early, later)
        pooled = average_to(early, (later.shape[-2], later.shape[-1]))
        return chain.run(pooled, later)
