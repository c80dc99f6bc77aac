"""`optimize_for_inference`: a copy of a model for evaluation alone, with everything constant folded and prepared."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.nn.fold import fold_normalizations, reparameterize
from biasloss_ext.nn.fused_conv_norm import FusedConvNormActivation, is_pointwise
from biasloss_ext.nn.fused_inverted_residual import FusedInvertedResidual, chain_of
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.inference_block import InferenceBlock, InferenceConvNorm, InferenceSkipBlock
from biasloss_ext.nn.plan import Plan, plan_of, whole
from biasloss_ext.nn.prepared import Prepared, refuse_state_dict
from biasloss_ext.nn.program import attach_programs, detach_programs
from biasloss_ext.nn.quantization.quantize import check_int8_support, quantize
from biasloss_ext.nn.skip_block import SkipBlock
from biasloss_ext.nn.unit import is_unit


def optimize_for_inference(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    calibrate_on: Tensor | Iterable[Any] | None = None,
) -> nn.Module:
    """A copy of ``model`` in evaluation mode, whose depthwise-separable blocks run on prepared tensors.

    Modules that can be re-parameterized, as those of MobileOne, RepViT and FastViT, are: by their own method ``reparameterize``,
    ``switch_to_deploy`` or ``fuse``. In the blocks that :func:`biasloss_ext.accelerate` knows, normalizations are folded into
    weights or into scale and shift that the next kernel applies on load; expansion, depthwise convolution and activation are one
    kernel where the device has it, gate, projection and residual another. Elsewhere every batch normalization after a
    convolution is folded into that, wherever torch.fx can follow the model or its modules. Scores agree with those of
    ``model.eval()`` but for rounding. The copy can be moved and converted (``.to()``, ``.half()``); its inner parts have no
    gradients, its state_dict has other keys, and ``train()`` raises.

    ``dtype=torch.int8`` quantizes the copy after training, by static scales: signed weights by output channel, unsigned
    activations by map, whose levels are chosen to lose least (mean square) on the calibration images. It takes and returns
    float32, on CPUs with AVX-512 VNNI or AVX2; scores differ, and the same images give the same bits for any number of
    threads. It raises where it would have to compute something else: with hooks on its layers, for gradients, compiled, or
    after a change of its layers. :func:`biasloss_ext.quantization_report` lists the layers that stay in float32.

    Args:
        model: any module; it is not changed.
        dtype: ``torch.int8`` to quantize; by default, the parameters keep their dtype.
        calibrate_on: for int8, images like those of the training set: a tensor (N, C, H, W), or an iterable, such as a
            DataLoader, of such tensors, alone or first of a tuple. Of an iterable the first 16 batches are used.

    Returns:
        The copy, channels_last: so are the maps that it returns, for images of either layout.

    Raises:
        TypeError: ``model`` is no module; ``calibrate_on`` yields something else than images.
        RuntimeError: this CPU has no int8 kernels.
        ValueError: a normalization has no running statistics; or the model is compiled, scripted or on the meta device; or
            ``dtype`` is another one, or ``calibrate_on`` is missing, empty or not wanted.
    """
    _check_quantization(dtype, calibrate_on)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_parameters(model)
    optimized = copy.deepcopy(model)
    detach_programs(optimized)
    # Maps stay channels_last from the first convolution on, whatever the images are: its weight or its input decides.
    optimized = reparameterize(optimized.eval()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    prepared = _prepared(optimized)
    if prepared is None:
        prepared = optimized
        _swap_children(optimized)
        fold_normalizations(optimized)
        attach_programs(optimized)
    if refuse_state_dict not in prepared._load_state_dict_pre_hooks.values():
        prepared.register_load_state_dict_pre_hook(refuse_state_dict)
    if dtype is torch.int8:
        assert calibrate_on is not None
        quantize(prepared, calibrate_on)
    return prepared


def _check_quantization(dtype: torch.dtype | None, calibrate_on: Tensor | Iterable[Any] | None) -> None:
    if dtype is None:
        if calibrate_on is not None:
            raise ValueError("calibrate_on is for dtype=torch.int8 alone")
        return
    if dtype is not torch.int8:
        raise ValueError(f"dtype must be torch.int8 or None, got {dtype}; convert the model with .to() for others")
    if calibrate_on is None:
        raise ValueError("dtype=torch.int8 needs calibrate_on: a tensor of images, or a loader of some batches")
    check_int8_support()


def _check_parameters(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted model cannot be changed; optimize the model that was scripted")
    if "_orig_mod" in model._modules:
        raise ValueError("the model is compiled already; optimize it first, then torch.compile the copy")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, and has no values to fold; load the weights first")


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
        chain = chain_of(module.core_block)
        return None if isinstance(chain, str) else InferenceSkipBlock(module, chain)
    if isinstance(module, FusedInvertedResidual):
        chain = chain_of(module.conv)
        return None if isinstance(chain, str) else InferenceBlock(module, whole(chain, module.has_residual))
    if isinstance(module, FusedConvNormActivation):
        return None if module.objection() is not None else InferenceConvNorm(module, is_pointwise(module[0]))  # type: ignore[arg-type]
    if isinstance(module, Prepared) or (not isinstance(module, FusedBlock) and not is_unit(module)):
        return None
    plain = module.plain if isinstance(module, FusedBlock) else module
    fold_normalizations(plain)
    plan = plan_of(plain)
    if isinstance(plan, Plan) and plan.objection() is None:
        return InferenceBlock(plain, plan)
    if plain is module:
        return None
    plain.training = False  # nothing is left in it that the wrapper could fuse
    _swap_children(plain)
    return plain
