"""`accelerate`: the blocks of ready-made models on the fused ops, in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from biasloss_ext.nn.fused_block import Fused
from biasloss_ext.nn.fused_conv_norm import FusedConvNormActivation, why_not_fusable
from biasloss_ext.nn.fused_inverted_residual import FusedInvertedResidual, FusedSkipBlock
from biasloss_ext.nn.fused_norm_activation import FusedNormActivation, fuse_norm
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.recognise import activation_of_norm, find, is_block


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

    Known are the blocks of torchvision's MobileNetV2, MobileNetV3 and EfficientNet, of timm's MobileNetV2, MobileNetV3,
    EfficientNet and EfficientNet-lite, and of this package; besides them torchvision's Conv2dNormActivation and timm's
    BatchNormAct2d (behind stem and last convolution). The state_dict keeps its keys, values and order; optimisers that hold the
    parameters stay valid; hooks stay. Results change by rounding alone; maps come out channels_last, which is also the fastest
    layout to feed.

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
    if is_block(model):
        raise ValueError(f"the model is itself a block ({type(model).__name__}); pass the model that contains it")
    entries, swaps = [], []
    for parent_name, parent in model.named_modules():
        for child_name, child in parent.named_children():
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            replacement = _replacement(child, fused)
            if replacement is None or _inside_block(model, name):
                continue
            reason = replacement if isinstance(replacement, str) else None
            if reason is not None and fused is True:
                raise ValueError(f"{name} ({type(child).__name__}) has no fused kernels: {reason}")
            entries.append(Entry(name, type(child).__name__, reason))
            if isinstance(replacement, nn.Module) and replacement is not child:
                swaps.append((parent, child_name, replacement))
    for parent, child_name, module in swaps:
        parent._modules[child_name] = module
    for module in model.modules():
        if isinstance(module, _FUSED):
            module.fused = fused
    return Report(tuple(entries))


def _inside_block(model: nn.Module, name: str) -> bool:
    """Whether one of the modules around the named one is a block, fused or not."""
    path = name.split(".")
    around = (model.get_submodule(".".join(path[:end])) for end in range(1, len(path)))
    return any(is_block(module) or isinstance(module, _FUSED) for module in around)


_FUSED = (FusedBlock, FusedInvertedResidual, FusedSkipBlock, FusedConvNormActivation, FusedNormActivation)


def _replacement(module: nn.Module, fused: Fused) -> nn.Module | str | None:
    """The fused module to take the place of this one, itself where it is fused already, why there is none, or None where
    the module is not of a kind that is looked for."""
    if isinstance(module, _FUSED):
        return module
    if is_block(module):
        found = find(module)
        return found if isinstance(found, str) else FusedBlock(module, fused)
    if type(module).__name__ == "Conv2dNormActivation":
        layers = list(module.children())
        activation = type(layers[2]) if len(layers) > 2 else nn.Identity
        if len(layers) not in (2, 3):
            return f"it has {len(layers)} layers, not convolution, normalisation and activation"
        return why_not_fusable(layers[0], layers[1], activation) or _fused_layer(module, layers, fused)
    if type(module).__name__ == "BatchNormAct2d":
        activation_or_reason = activation_of_norm(module)
        return activation_or_reason if isinstance(activation_or_reason, str) else fuse_norm(module, fused)
    return None


def _fused_layer(module: nn.Module, layers: list[nn.Module], fused: Fused) -> FusedConvNormActivation:
    replacement = FusedConvNormActivation(*layers, fused=fused)
    replacement.train(module.training)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        replacement.__dict__[name] = module.__dict__[name]
    return replacement
