"""The loss behind `functional.bias_loss` and `FusedBiasLoss`: checks, the choice of the backend, and its run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from biasloss_ext import checks
from biasloss_ext.ops import backends
from biasloss_ext.ops.bias_loss import op as bias_loss_op
from biasloss_ext.ops.bias_loss import reference as bias_loss_reference
from biasloss_ext.ops.feature_variance import op as feature_variance_op
from biasloss_ext.ops.feature_variance import reference as feature_variance_reference
from biasloss_ext.ops.library import accumulation_dtype


def weighted_cross_entropy(
    features: Tensor | None,
    output: Tensor,
    target: Tensor,
    running_min: Tensor | None,
    *,
    variance: Tensor | None,
    alpha: float,
    beta: float,
    update_running_min: bool,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    process_group: dist.ProcessGroup | None,
    backend: str,
    want_weight: bool = True,
) -> tuple[Tensor, ...]:
    """Check the arguments, choose the backend and run it: (loss, weight), or (loss,) without ``want_weight``.

    ``running_min`` is updated in place; None selects the local mode. Plain arguments (contiguous scores, class targets)
    take a short path, since the features push Python's code out of the caches and every line costs a training step time.
    On that path the compiled kernels check the arguments, and Python looks for the cause only if they refuse.
    """
    chosen = backends.choose(backend, output.device)
    if chosen != "reference" and not torch.compiler.is_compiling() and bias_loss_op.transforms_are_active():
        chosen = backends.under_transform(backend)
    plain = (
        chosen in backends.COMPILED
        and type(output) is type(target) is type(features) is Tensor
        and target.dtype is torch.int64
        and output.dim() == 2
        and variance is None
        and weight is None
        and process_group is None
        and not checks.targets_are_checked
    )
    shape, extrema = output.shape, None
    if not plain:
        checks.tensors(features, variance, output, target, weight)
        checks.probabilities(target, ignore_index)
        if chosen != "reference" and target.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "target requires a gradient, and the fused kernels compute none: pass target.detach(), or backend='reference'"
            )
        if checks.targets_are_checked or (chosen == "reference" and _can_look_at(output, target)):
            checks.classes_in_range(output, target, ignore_index)
        if process_group is not None:
            features, variance, extrema = _over_ranks(features, variance, chosen, process_group)
        dtype = accumulation_dtype(output.dtype)
        extrema, variance, weight = (_values(t, dtype) for t in (extrema, variance, weight))
        if target.is_floating_point() and target.dtype != output.dtype:
            target = target.to(dtype)
        if output.dim() > 3:  # the kernels know one position dimension; a copy only where the strides allow no view
            output = output.flatten(2)
            target = target.flatten(2 if target.is_floating_point() else 1)
    before = features, variance, extrema
    after: tuple[Any, ...] = (
        target,
        weight,
        running_min,
        alpha,
        beta,
        update_running_min,
        checks.REDUCTIONS.index(reduction),
        ignore_index,
        label_smoothing,
    )
    results: tuple[Tensor, ...]
    if chosen == "reference":
        results = bias_loss_reference.loss_and_weight(bias_loss_reference.Arguments(*before, output, *after))
    else:
        op = bias_loss_op.triton if chosen == "triton" else bias_loss_op.native
        try:
            results = op(output, before, after, 2 if want_weight else 1)
        except (RuntimeError, ValueError) as error:
            raise _explained(error, features, variance, output, target, weight) from None
    loss = results[0]
    if len(shape) > 3 and reduction == "none":
        loss = loss.unflatten(1, shape[2:])
    # A copy: the backward pass reads the op's own weights, whatever the caller does to these.
    return (loss, results[1].detach().clone()) if want_weight else (loss,)


def _can_look_at(output: Tensor, target: Tensor) -> bool:
    """Whether the classes can be looked at now, and without waiting for a device."""
    return (
        output.device.type == target.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bias_loss_op.transforms_are_active()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and type(target) in (Tensor, torch.nn.Parameter)
    )


def _over_ranks(
    features: Tensor | None, variance: Tensor | None, backend: str, process_group: dist.ProcessGroup
) -> tuple[None, Tensor, Tensor]:
    """No features, their variances, and the extrema of all ranks' variances."""
    if features is not None:
        variance, extrema = variance_and_extrema(features, backend)
    else:
        assert variance is not None
        variance = variance.detach()
        extrema = feature_variance_reference.extrema_of(variance)
    dist.all_reduce(extrema, dist.ReduceOp.MAX, group=process_group)
    return None, variance, extrema


def _values(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.detach().to(dtype).contiguous()


def _explained(
    error: Exception,
    features: Tensor | None,
    variance: Tensor | None,
    output: Tensor,
    target: Tensor,
    weight: Tensor | None,
) -> Exception:
    """What to raise for an error of the op: the checks in C++ throw nothing but a RuntimeError."""
    try:
        checks.tensors(features, variance, output, target, weight)
    except (TypeError, ValueError) as wrong:
        return wrong
    return error


def variance_and_extrema(features: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    variance, extrema = feature_variance_op.feature_variance(features.detach(), backend=backend)
    return variance, extrema
