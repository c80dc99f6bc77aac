"""`accelerate`: the blocks of ready-made models on the fused ops, in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from biasloss_ext.nn.fused_block import Fused
from biasloss_ext.nn.fused_conv_norm import FusedConvNormActivation, why_not_fusable
from biasloss_ext.nn.fused_inverted_residual import FusedInvertedResidual, FusedSkipBlock
from biasloss_ext.nn.fused_norm_activation import FusedNormActivation, fuse_norm
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.nn.recognise import activation_of_norm, find, is_block, is_norm_with_activation, is_sequence


@dataclass(frozen=True)
class Entry:
    """One block or layer: its name in the model, its class, and why it was left as it was; None where it is fused now."""

    name: str
    kind: str
    reason: str | None


@dataclass(frozen=True)
class Report:
    """What `accelerate` found. Its text lists every block."""

    entries: tuple[Entry, ...]

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is not None)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} of {len(self.entries)} blocks and layers are fused"]
        lines += [
            f"  {e.name} ({e.kind}): {'fused' if e.reason is None else f'left, {e.reason}'}" for e in self.entries
        ]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, fused: Fused = "auto") -> Report:
    """Swap the depthwise-separable blocks of ``model`` for fused ones, in place.

    A block is what its forward computes, as torch.fx follows it, whoever wrote it and whatever its classes are called:
    (expansion,) depthwise convolution, (squeeze-and-excitation,) projection, each with its normalization and activation, and a
    residual where there is one. So are found the blocks of MobileNetV2 and V3, MNASNet and EfficientNet, in torchvision, in timm
    and written by hand. Outside of blocks, sequences of convolution, normalization and activation are fused, and normalizations
    that apply an activation themselves, as timm's BatchNormAct2d. The state_dict keeps its keys, values and order; optimizers
    that hold the parameters stay valid; hooks and attributes stay. Results change by rounding alone; maps come out channels_last,
    which is also the fastest layout to feed.

    Args:
        model: any module. What is fused already is listed as such.
        fused: "auto" runs a block as it was wherever no fused kernels can; True raises in the call instead.

    Returns:
        `Report`: what was swapped, what was left, and why. Print it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``fused`` is True, and a block has no fused kernels; it names the block and the reason, and nothing is
            swapped. Or ``model`` is itself a block: there is nothing to swap it in.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if fused not in ("auto", True):
        raise ValueError(f"fused must be 'auto' or True, got {fused!r}")
    found = [] if isinstance(model, InvertedResidual) else list(_candidates(model, "", fused))
    if not any(candidate.replacement for candidate in found) and is_block(model) and not isinstance(find(model), str):
        raise ValueError(f"the model is itself a block ({type(model).__name__}); pass the model that contains it")
    entries = tuple(Entry(c.name, type(c.module).__name__, c.reason) for c in found)
    for candidate in found:
        if candidate.reason is not None and fused is True:
            kind = type(candidate.module).__name__
            raise ValueError(f"{candidate.name} ({kind}) has no fused kernels: {candidate.reason}")
    for candidate in found:
        if candidate.replacement is not None:
            candidate.parent._modules[candidate.name.rpartition(".")[2]] = candidate.replacement
    for module in model.modules():
        if isinstance(module, _FUSED):
            module.fused = fused
    return Report(entries)


class _Candidate(NamedTuple):
    """A module that may be fused: what is to take its place, itself where it is fused already, or why it is left."""

    parent: nn.Module
    name: str
    module: nn.Module
    replacement: nn.Module | None
    reason: str | None


def _candidates(parent: nn.Module, prefix: str, fused: Fused) -> Iterator[_Candidate]:
    """From the outside in: what is within a fused module is no candidate; what is within one that is left may be."""
    for name, child in parent.named_children():
        path = f"{prefix}{name}"
        found = _replacement(child, fused)
        if isinstance(found, nn.Module):
            yield _Candidate(parent, path, child, found, None)
            continue
        if found is not None:
            yield _Candidate(parent, path, child, None, found)
        yield from _candidates(child, f"{path}.", fused)


_FUSED = (FusedBlock, FusedInvertedResidual, FusedSkipBlock, FusedConvNormActivation, FusedNormActivation)


def _replacement(module: nn.Module, fused: Fused) -> nn.Module | str | None:
    """The fused module to take the place of this one, itself where it is fused already, why there is none, or None where
    the module is not of a kind that is looked for."""
    if isinstance(module, _FUSED):
        return module
    if is_block(module):
        found = find(module)
        if not isinstance(found, str):
            return FusedBlock(module, fused)
        if not is_sequence(module):
            return found
    if is_sequence(module):
        layers = list(module.children())
        activation = type(layers[2]) if len(layers) > 2 else nn.Identity
        return why_not_fusable(layers[0], layers[1], activation) or _fused_layer(module, fused)
    if is_norm_with_activation(module):
        activation_or_reason = activation_of_norm(module)
        return activation_or_reason if isinstance(activation_or_reason, str) else fuse_norm(module, fused)
    return None


def _fused_layer(module: nn.Module, fused: Fused) -> FusedConvNormActivation:
    """Children, parameters, hooks and attributes of the module, under its names."""
    replacement = FusedConvNormActivation(*module.children(), fused=fused)
    replacement.__dict__.update(module.__dict__)
    replacement.fused = fused
    return replacement
