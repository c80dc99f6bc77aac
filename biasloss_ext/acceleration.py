"""`accelerate`: moves the depthwise-separable parts of any model to the fused ops, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from biasloss_ext.measured import slower_when_fused
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d, is_depthwise, without_kernel
from biasloss_ext.nn.depthwise_forms import MultipliedDepthwiseConv2d, form_of, twin_of
from biasloss_ext.nn.fused_chain import Fused
from biasloss_ext.nn.fused_conv_norm import FusedConvNormActivation
from biasloss_ext.nn.fused_inverted_residual import FusedInvertedResidual, FusedSkipBlock
from biasloss_ext.nn.fused_norm_activation import FusedNormActivation, fuse_norm
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.plan import Plan, plan_of
from biasloss_ext.nn.prepared import Prepared
from biasloss_ext.nn.recognize import activation_of_norm, is_norm_with_activation
from biasloss_ext.nn.unit import is_unit
from biasloss_ext.report import Entry, Report, layers_of

FUSED = (FusedBlock, FusedInvertedResidual, FusedSkipBlock, FusedConvNormActivation, FusedNormActivation)


def accelerate(model: nn.Module, *, fused: Fused = "auto", measure_on: Tensor | None = None) -> Report:
    """Run the depthwise-separable parts of ``model`` on fused kernels, in place.

    Blocks are found by what their forward computes, as torch.fx follows it, regardless of their author and class names. Within
    a block, each chain of depthwise and 1x1 convolutions with their normalizations, activations, squeeze-and-excitations, layer
    scales and residuals becomes one autograd function. Operations without kernels stay between the chains as they were. This
    covers the blocks of MobileNetV1 to V4, MNASNet, EfficientNet, LCNet, GhostNet and many others, in torchvision, in timm and
    in your own code. Outside of blocks, it fuses sequences of convolution, normalization and activation, normalizations that
    apply an activation themselves (timm's BatchNormAct2d), and depthwise convolutions.

    The state_dict keeps its keys, values and order. Optimizers that hold the parameters stay valid, and hooks and attributes
    stay. Results change only by rounding. Output maps are channels_last, which is also the fastest input layout.

    Args:
        model: any module. Parts that are fused already are listed as such.
        fused: "auto" runs a block as it was if no fused kernels can run; True raises in the call instead.
        measure_on: a batch of images like those that the model will see, on the device of the model. Each fused module is timed
            in both forms, in the present mode of the model: forward and backward in training mode, or forward after
            ``model.eval()``. A module runs its plain layers if these are faster. This takes about as long as twenty steps, and
            twice the memory of the model.

    Returns:
        The number of layers that run on fused kernels, and the reasons for the others. Print it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``fused`` is True and a depthwise convolution has no kernel; the message names the layer and the reason, and
            the model does not change. Also if ``model`` is itself a block, compiled or scripted; or if
            ``measure_on`` is given with ``fused=True``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if fused not in ("auto", True):
        raise ValueError(f"fused must be 'auto' or True, got {fused!r}")
    if fused is True and measure_on is not None:
        raise ValueError(
            "measure_on chooses between fused and plain layers, and fused=True allows no choice: pass one of them"
        )
    _check_kind(model)
    if _is_block(model):
        raise ValueError(f"the model is itself a block ({type(model).__name__}); pass the model that contains it")
    found = list(_candidates(model, "", {}, fused))
    fused_layers = {layer for candidate in found for layer in candidate.fused_layers}
    reasons = {layer: reason for candidate in found for layer, reason in candidate.reasons.items()}
    if fused is True:
        _check_depthwise(model, fused_layers, reasons)
    _swap_depthwise(model, fused_layers)
    for candidate in found:
        if candidate.replacement is not None:
            for parent, name in candidate.places:
                parent._modules[name] = candidate.replacement
    for module in list(model.modules()):
        if isinstance(module, FUSED):
            module.fused = fused
        elif callable(getattr(module, "fuse_model", None)):
            module.__dict__["fuse_model"] = _refuse_fuse_model
    slower: dict[str, str] = {}
    if measure_on is not None:
        names = [name for name, module in model.named_modules() if isinstance(module, FUSED)]
        slower = slower_when_fused(model, names, measure_on)
    for name, reason in slower.items():
        module = model.get_submodule(name)
        module.__dict__["fused"] = False
        reasons.update(dict.fromkeys(module.modules(), reason))
    entries = tuple(Entry(c.name, type(c.module).__name__, c.reason or slower.get(c.name)) for c in found)
    return Report(entries, layers_of(model, reasons))


def _check_kind(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "a scripted model cannot be changed; accelerate the model before torch.jit.script or torch.jit.trace"
        )
    if "_orig_mod" in model._modules:
        raise ValueError("the model is compiled already; accelerate it first, then torch.compile it")


def _refuse_fuse_model(*_: object, **__: object) -> NoReturn:
    """Replaces a method of torchvision's quantizable models that would silently leave most blocks as they are."""
    raise RuntimeError(
        "fuse_model() looks for classes of blocks that accelerate() has replaced: call it before accelerate()"
    )


class _Candidate(NamedTuple):
    """A module that may be fused.

    Attributes:
        places: its parents, and its name in each of them.
        name: its name in the model.
        module: the module itself.
        replacement: its fused form, or the module itself if it is fused already; None if it is left.
        reason: why it is left; None if it is not.
    """

    places: list[tuple[nn.Module, str]]
    name: str
    module: nn.Module
    replacement: nn.Module | None
    reason: str | None

    @property
    def fused_layers(self) -> set[nn.Module]:
        """The layers within it that run on fused kernels."""
        if isinstance(self.replacement, FusedBlock) and self.replacement is not self.module:
            return self.replacement.fused_layers
        return set() if self.replacement is None else set(self.module.modules())

    @property
    def reasons(self) -> dict[nn.Module, str]:
        """Why layers within it do not run on fused kernels."""
        if self.reason is not None:
            return dict.fromkeys(self.module.modules(), self.reason)
        plan = self.replacement.plan() if isinstance(self.replacement, FusedBlock) else None
        return plan.reasons if isinstance(plan, Plan) else {}


def _candidates(
    parent: nn.Module, prefix: str, seen: dict[nn.Module, _Candidate | None], fused: Fused
) -> Iterator[_Candidate]:
    """From the outside in. Modules within a fused module are no candidates; modules within one that is left may be."""
    for name, child in parent._modules.items():
        if child is None or isinstance(child, Prepared):
            continue
        known = seen.get(child)
        if known is not None:  # shared
            known.places.append((parent, name))
        if child in seen:
            continue
        candidate = _candidate(parent, name, f"{prefix}{name}", child, fused)
        seen[child] = candidate
        if candidate is not None:
            yield candidate
        if candidate is None or candidate.reason is not None:
            yield from _candidates(child, f"{prefix}{name}.", seen, fused)


def _candidate(parent: nn.Module, name: str, path: str, module: nn.Module, fused: Fused) -> _Candidate | None:
    """None if the module is not of a kind that can be fused."""
    found = _fused_form(module, fused)
    if found is None:
        return None
    replacement, reason = (None, found) if isinstance(found, str) else (found, None)
    return _Candidate([(parent, name)], path, module, replacement, reason)


def _fused_form(module: nn.Module, fused: Fused) -> nn.Module | str | None:
    """The module that replaces this one, why there is none, or None if the module is not of a kind that can be fused."""
    if isinstance(module, FUSED):
        return module
    if is_unit(module):
        block = FusedBlock(module, fused)
        plan = block.plan()
        objection = plan if isinstance(plan, str) else plan.objection()
        return block if objection is None else objection
    if is_norm_with_activation(module) or type(module) is nn.SyncBatchNorm:
        activation = activation_of_norm(module)
        return activation if isinstance(activation, str) else fuse_norm(module, fused)
    return None


def _is_block(model: nn.Module) -> bool:
    plan = plan_of(model) if is_unit(model) else None
    return isinstance(plan, Plan) and plan.adds_input is not None


def _check_depthwise(model: nn.Module, fused_layers: set[nn.Module], reasons: dict[nn.Module, str]) -> None:
    """Raise if a depthwise convolution would stay on PyTorch's kernels."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not is_depthwise(module) or module in fused_layers:
            continue
        if form_of(module) not in (DepthwiseConv2d, MultipliedDepthwiseConv2d):
            reason = reasons.get(module) or f"there is no kernel for {', '.join(without_kernel(module))}"
            raise ValueError(f"{name} ({type(module).__name__}) has no fused kernels: {reason}")


def _swap_depthwise(model: nn.Module, fused_layers: set[nn.Module]) -> None:
    """Run the remaining depthwise convolutions on their kernels."""
    twins: dict[nn.Module, nn.Conv2d] = {}
    prepared = {inner for module in model.modules() if isinstance(module, Prepared) for inner in module.modules()}
    for parent in set(model.modules()) - prepared:
        for name, child in parent._modules.items():
            if type(child) is not nn.Conv2d or child in fused_layers or "forward" in child.__dict__:
                continue
            form = form_of(child) if is_depthwise(child) else None
            if form is not None:
                twins[child] = parent._modules[name] = twins.get(child) or twin_of(child, form)
