"""`optimize_for_inference`: a copy of a model for evaluation alone, with everything constant folded and prepared."""

from __future__ import annotations

import copy

from torch import nn

from biasloss_ext.nn.fused_block import ACTIVATIONS, is_watched
from biasloss_ext.nn.fused_conv_norm import FusedConvNormActivation, is_pointwise, why_not_fusable
from biasloss_ext.nn.fused_inverted_residual import parts_of
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.inference_block import (
    InferenceBlock,
    InferenceConvNorm,
    InferenceSkipBlock,
    Prepared,
    refuse_state_dict,
)
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.nn.recognise import Found, find, is_block, is_sequence
from biasloss_ext.nn.skip_block import SkipBlock


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode, whose depthwise-separable blocks run on prepared tensors.

    Batch normalisations are folded into weights or into scale and shift that the next kernel applies on load; expansion,
    depthwise convolution and activation are one kernel where the device has it, gate, projection and residual another.
    The blocks are those that :func:`biasloss_ext.accelerate` knows. Scores agree with those of ``model.eval()`` but for
    rounding. timm's stem and last convolution run as they are, unfolded; :func:`biasloss_ext.accelerate` first fuses their
    normalisations. The copy can be moved and converted (``.to()``, ``.half()``); its inner parts have no gradients, its
    state_dict has other keys, and ``train()`` raises.

    Args:
        model: any module; it is not changed.

    Returns:
        The copy. Feed it channels_last images where you can.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a normalisation has no running statistics.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimized = copy.deepcopy(model).eval()
    _swap_children(optimized)
    optimized = _prepared(optimized) or optimized
    if refuse_state_dict not in optimized._load_state_dict_pre_hooks.values():
        optimized.register_load_state_dict_pre_hook(refuse_state_dict)
    return optimized


def _swap_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        replacement = _prepared(child)
        if replacement is None:
            if not isinstance(child, Prepared):
                _swap_children(child)
        else:
            module._modules[name] = replacement


def _prepared(module: nn.Module) -> nn.Module | None:
    """The module on prepared tensors, or None where it is of no known kind or has no kernels."""
    if isinstance(module, SkipBlock):
        parts = parts_of(module.core_block)
        return None if isinstance(parts, str) else InferenceSkipBlock(module, Found(parts, False))
    if isinstance(module, (FusedBlock, InvertedResidual)) or is_block(module):
        found = find(module.plain if isinstance(module, FusedBlock) else module)
        return None if isinstance(found, str) else InferenceBlock(module, found)
    if isinstance(module, FusedConvNormActivation) or is_sequence(module):
        layers = list(module.children())
        activation = type(layers[2]) if len(layers) == 3 else nn.Identity
        if any(map(is_watched, layers)) or why_not_fusable(layers[0], layers[1], activation) is not None:
            return None
        return InferenceConvNorm(module, ACTIVATIONS[activation], is_pointwise(layers[0]))  # type: ignore[arg-type]
    return None
