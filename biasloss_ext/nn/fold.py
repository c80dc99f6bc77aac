"""Folds batch normalizations into the convolutions before them, in place, for evaluation only."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from biasloss_ext.nn.chain import Step, is_watched
from biasloss_ext.nn.chain_search import Search
from biasloss_ext.nn.data_flow import Flow, Unfamiliar
from biasloss_ext.nn.fused_chain import constants_of
from biasloss_ext.nn.padding import pads_same
from biasloss_ext.nn.prepared import Prepared
from biasloss_ext.nn.recognize import norm_of
from biasloss_ext.ops.library import accumulation_dtype

REPARAMETERIZE = ("reparameterize", "switch_to_deploy", "fuse")  # methods of timm's modules, and of the authors' code


def reparameterize(model: nn.Module) -> nn.Module:
    """Let every module that can merge its parallel branches do so; returns the model, or its replacement."""
    for name in REPARAMETERIZE:
        merge = getattr(model, name, None)
        if callable(merge):
            return _merged(model, merge)
    for name, child in model.named_children():
        replacement = reparameterize(child)
        if replacement is not child:
            model._modules[name] = replacement
    return model


def _merged(model: nn.Module, merge: Any) -> nn.Module:
    """The result of the method in the dtype of the model, since some methods make layers of the default dtype."""
    dtype, default = (
        next((p.dtype for p in model.parameters() if p.is_floating_point()), None),
        torch.get_default_dtype(),
    )
    try:
        if dtype is torch.float64:
            torch.set_default_dtype(dtype)
        merged = merge()
    finally:
        torch.set_default_dtype(default)
    merged = merged if isinstance(merged, nn.Module) else model
    return merged.to(dtype).eval()


def fold_normalizations(module: nn.Module) -> None:
    """Fold the normalizations after convolutions outside of chains, in every module that torch.fx can follow, from the outside
    in. Prepared modules hold tensors made from their layers, so these layers stay as they are."""
    if "forward" in module.__dict__ or not module._modules or isinstance(module, Prepared):
        return
    try:
        flow = Flow(module)
    except Unfamiliar:
        for child in module.children():
            fold_normalizations(child)
        return
    in_chains = {
        layer
        for found in Search(flow).chains()
        for step in found.chain.steps
        if step.convolution
        for layer in step.modules
    }
    calls: dict[nn.Module, int] = {}
    for node in flow.graph.nodes:
        layer = flow.layer(node)
        if layer is not None:
            calls[layer] = calls.get(layer, 0) + 1
    for node in list(flow.graph.nodes):
        convolution = flow.layer(node)
        if not _is_plain(convolution) or convolution in in_chains or len(node.users) != 1:
            continue
        (user,) = node.users
        norm = flow.layer(user)
        if norm is None or calls[convolution] > 1 or calls[norm] > 1 or is_watched(convolution) or is_watched(norm):
            continue
        activation = _activation_after(norm)
        if activation is not None:
            _fold(convolution, norm)
            _replace(module, user, activation)


def _is_plain(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return type(layer) is nn.Conv2d or (layer is not None and pads_same(layer))


def _activation_after(norm: nn.Module) -> nn.Module | None:
    """The activation that a normalization applies itself; None if it cannot be folded."""
    number = norm_of(norm)
    if number is None or isinstance(number, str):
        return None
    act: Any = norm._modules.get("act")
    return nn.Identity() if act is None else act


@torch.no_grad()
def _fold(convolution: nn.Conv2d, norm: nn.Module) -> None:
    dtype = accumulation_dtype(convolution.weight.dtype)
    scale, shift = constants_of(Step(convolution, norm), dtype)[2:]
    weight: Tensor = convolution.weight.to(dtype) * scale[:, None, None, None]
    convolution.weight = nn.Parameter(weight.to(convolution.weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(convolution.weight.dtype), requires_grad=False)


def _replace(root: nn.Module, node: fx.Node, replacement: nn.Module) -> None:
    owner, _, name = str(node.target).rpartition(".")
    root.get_submodule(owner)._modules[name] = replacement
