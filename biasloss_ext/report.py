"""The report of `accelerate`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn.chain import channels_of
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d, is_depthwise, without_kernel
from biasloss_ext.nn.depthwise_forms import LargeDepthwiseConv2d, MultipliedDepthwiseConv2d, form_of
from biasloss_ext.nn.fused_conv_norm import FusedConvNormActivation, is_pointwise
from biasloss_ext.nn.fused_inverted_residual import FusedInvertedResidual, FusedSkipBlock, chain_of
from biasloss_ext.nn.fused_norm_activation import FusedNormActivation
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.prepared import Prepared
from biasloss_ext.nn.recognize import is_frozen_norm

DEPTHWISE, POINTWISE, NORMALIZATION = "depthwise convolution", "1x1 convolution", "normalization"
KINDS = (DEPTHWISE, POINTWISE, NORMALIZATION)
MOST_NAMES = 4  # of layers, in a line of the text


@dataclass(frozen=True)
class Entry:
    """One block or layer that `accelerate` looked at.

    Attributes:
        name: its name in the model.
        kind: its class.
        reason: why it was left as it was; None if it is fused.
    """

    name: str
    kind: str
    reason: str | None


@dataclass(frozen=True)
class Layer:
    """One convolution or normalization.

    Attributes:
        name: its name in the model.
        kind: "depthwise convolution", "1x1 convolution" or "normalization".
        cost: multiply-adds per position of its output.
        reason: why it does not run on a fused kernel; None if it does.
    """

    name: str
    kind: str
    cost: int
    reason: str | None


class Count(NamedTuple):
    """The number of layers of a kind that run on fused kernels, and the number of all layers of that kind."""

    fused: int
    total: int


@dataclass(frozen=True)
class Report:
    """The result of `accelerate`. Print it for a summary.

    Attributes:
        entries: the blocks and layers that `accelerate` looked at, from the outside in.
        layers: every depthwise convolution, 1x1 convolution and normalization of the model.
    """

    entries: tuple[Entry, ...]
    layers: tuple[Layer, ...]

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The entries that are fused."""
        return tuple(entry for entry in self.entries if entry.reason is None)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The entries that were left as they were."""
        return tuple(entry for entry in self.entries if entry.reason is not None)

    def count(self, kind: str) -> Count:
        """Count the layers of a kind: "depthwise convolution", "1x1 convolution" or "normalization"."""
        of_kind = [layer for layer in self.layers if layer.kind == kind]
        return Count(sum(layer.reason is None for layer in of_kind), len(of_kind))

    def reasons(self) -> dict[str, tuple[Layer, ...]]:
        """The layers that do not run on fused kernels, by reason; the most expensive reason comes first."""
        found: dict[str, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            if layer.reason is not None:
                found[layer.reason].append(layer)
        by_cost = sorted(found.items(), key=lambda item: -sum(layer.cost for layer in item[1]))
        return {reason: tuple(layers) for reason, layers in by_cost}

    def __str__(self) -> str:
        counts = ", ".join(f"{c.fused} of {c.total} {kind}s" for kind in KINDS if (c := self.count(kind)).total)
        lines = [f"on fused kernels: {counts or 'nothing, as the model has no such layers'}"]
        for reason, layers in self.reasons().items():
            kinds = [(kind, sum(layer.kind == kind for layer in layers)) for kind in KINDS]
            which = ", ".join(f"{number} {kind}{'s' if number > 1 else ''}" for kind, number in kinds if number)
            names = ", ".join(layer.name for layer in layers[:MOST_NAMES]) + (
                " ..." if len(layers) > MOST_NAMES else ""
            )
            lines.append(f"  left: {which} ({names}): {reason}")
        return "\n".join(lines)


def layers_of(model: nn.Module, reasons: dict[nn.Module, str]) -> tuple[Layer, ...]:
    """The layers of an accelerated model, each listed once.

    Args:
        model: a model after `accelerate`.
        reasons: why layers are left, if known.
    """
    fused = _fused_layers(model)
    found = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is not None:
            reason = None if module in fused else reasons.get(module) or _own_reason(module, kind)
            found.append(Layer(name, kind, _cost(module), reason))
    return tuple(found)


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Conv2d):
        if is_depthwise(module):
            return DEPTHWISE
        return POINTWISE if module.kernel_size == (1, 1) and module.groups == 1 else None
    return NORMALIZATION if isinstance(module, _BatchNorm) or is_frozen_norm(module) else None


def _cost(module: nn.Module) -> int:
    if isinstance(module, nn.Conv2d):
        return module.weight.numel()
    return channels_of(module)


def _own_reason(module: nn.Module, kind: str) -> str:
    """The reason for a layer outside of blocks and sequences."""
    if kind == DEPTHWISE and isinstance(module, nn.Conv2d):
        if isinstance(module, LargeDepthwiseConv2d):
            return f"only the gradients of a {'x'.join(map(str, module.kernel_size))} kernel are on fused kernels"
        if type(module) is not nn.Conv2d:
            return f"{type(module).__name__} may not compute the same as Conv2d"
        return f"there is no kernel for {', '.join(without_kernel(module))}"
    return "it is not in a traceable block with a depthwise convolution and a normalization"


def _fused_layers(model: nn.Module) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for module in model.modules():
        if getattr(module, "fused", None) is False:  # it runs its plain layers
            continue
        if isinstance(module, FusedBlock):
            found |= module.fused_layers
        elif isinstance(module, FusedInvertedResidual | FusedSkipBlock):
            chain = chain_of(module.conv if isinstance(module, FusedInvertedResidual) else module.core_block)
            found |= set() if isinstance(chain, str) else set(chain.layers)
        else:
            found |= _fused_alone(module)
    return found


def _fused_alone(module: nn.Module) -> set[nn.Module]:
    if isinstance(module, DepthwiseConv2d | MultipliedDepthwiseConv2d):
        return {module} if form_of(module) is type(module) else set()
    if isinstance(module, FusedNormActivation):
        return {module}
    if isinstance(module, Prepared):
        return set(module.modules())
    if isinstance(module, FusedConvNormActivation) and module.objection() is None:
        convolution = module[0]
        assert isinstance(convolution, nn.Conv2d)
        has_kernel = is_pointwise(convolution) or (is_depthwise(convolution) and not without_kernel(convolution))
        return {convolution, module[1]} if has_kernel else {module[1]}
    return set()
