"""Stateless functions: the documented face of the ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext import checks
from biasloss_ext.ops import backends, tracing
from biasloss_ext.ops.bias_loss import op as bias_loss_op
from biasloss_ext.ops.bias_loss import reference as bias_loss_reference
from biasloss_ext.ops.depthwise import convolution
from biasloss_ext.ops.depthwise import reference as depthwise_reference
from biasloss_ext.ops.feature_variance import op as feature_variance_op
from biasloss_ext.ops.feature_variance import reference as feature_variance_reference
from biasloss_ext.ops.library import accumulation_dtype

__all__ = ["BiasLossOutput", "bias_loss", "bias_weight", "depthwise_conv2d", "feature_variance"]


class BiasLossOutput(NamedTuple):
    """What :func:`bias_loss` returns.

    Attributes:
        loss: the reduced loss, or (N, *d) for ``reduction="none"``; float32, float64 for float64 scores.
        weight: w_i of every sample, (N,), detached, dtype of ``loss``.
        running_min: the moved running minimum, 0-d float32; None in local mode.
    """

    loss: Tensor
    weight: Tensor
    running_min: Tensor | None


def feature_variance(features: Tensor, *, backend: str = "auto") -> Tensor:
    """Unbiased variance (divisor n - 1) over all n activations of each sample; 0 where n is 1.

    Args:
        features: (N, *) of float16, bfloat16, float32 or float64. Contiguous, channels_last and every other layout
            whose samples are dense is read in place; any other is made contiguous once. Treated as a constant.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        (N,) in float32 (float64 for float64 features), detached. Relative error at most 1e-5 up to mean/std = 1000.
        NaN for a sample with NaN or infinite activations. Deterministic.

    Raises:
        TypeError: ``features`` is no floating-point tensor.
        ValueError: it has no batch dimension or no activations; unknown backend.
        RuntimeError: the named backend cannot run on this device.
    """
    checks.features(features)
    return _variance_and_extrema(features, backends.choose(backend, features.device))[0]


def bias_weight(
    variance: Tensor,
    running_min: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.3,
) -> Tensor:
    """``w_i = exp(alpha * v_i) - beta`` with ``v_i = (variance_i - low) / (max - min)`` over the batch.

    ``low`` is the smallest variance of the batch, or ``min(running_min, that)`` where a running minimum is given (the
    "global" mode). v is 0 where all variances are equal; ``alpha * v`` is capped at 60; every weight is NaN where a
    variance is not finite. Abrahamyan et al., "Bias Loss for Mobile Neural Networks", ICCV 2021, with the constants of
    the authors' current code.

    Args:
        variance: (N,), floating point, as from :func:`feature_variance`.
        running_min: 0-d, not changed.
        alpha: at least 0.
        beta: below 1.

    Returns:
        (N,) in float32 (float64 for float64 variances), detached.

    Raises:
        TypeError, ValueError: arguments of another kind, naming what was given.
    """
    checks.hyperparameters(alpha, beta)
    checks.variance(variance)
    checks.running_min(running_min)
    if running_min is not None and running_min.device != variance.device:
        raise ValueError(
            f"running_min is on {running_min.device}, variance on {variance.device}: move them to one device"
        )
    variance = variance.detach().to(accumulation_dtype(variance.dtype))
    extrema = feature_variance_reference.extrema_of(variance)
    return bias_loss_reference.bias_weight(variance, extrema, running_min, alpha, beta, update_running_min=False)


def bias_loss(
    features: Tensor | None,
    output: Tensor,
    target: Tensor,
    running_min: Tensor | None = None,
    *,
    variance: Tensor | None = None,
    alpha: float = 0.3,
    beta: float = 0.3,
    normalisation_mode: str = "global",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> BiasLossOutput:
    """Cross-entropy weighted per sample by the variance of its features, without state.

    The arguments are those of :class:`biasloss_ext.FusedBiasLoss`, whose documentation has the formulas, shapes and
    errors.

    Args:
        running_min: smallest variance seen so far, 0-d float32; None starts at infinity. Not changed: the moved one is
            returned. Ignored in local mode.

    Returns:
        :class:`BiasLossOutput`: loss, weights and the running minimum to hand to the next call.
    """
    checks.hyperparameters(alpha, beta, label_smoothing, normalisation_mode, reduction, ignore_index)
    checks.floating("output", output)
    checks.running_min(running_min)
    moved = None
    if normalisation_mode == "global":
        if running_min is None:
            moved = torch.full((), torch.inf, dtype=torch.float32, device=output.device)
        else:
            moved = running_min.detach().to(device=output.device, dtype=torch.float32, copy=True)
    loss, sample_weight = weighted_cross_entropy(
        features,
        output,
        target,
        moved,
        variance=variance,
        alpha=float(alpha),
        beta=float(beta),
        update_running_min=True,
        weight=weight,
        ignore_index=int(ignore_index),
        reduction=reduction,
        label_smoothing=float(label_smoothing),
        process_group=process_group,
        backend=backend,
    )
    return BiasLossOutput(loss, sample_weight, moved)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    *,
    same_padding: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding=k // 2, groups=C)``, on kernels of its own.

    Args:
        x: (N, C, H, W) or (C, H, W) of float16, bfloat16, float32 or float64, any layout.
        weight: (C, 1, k, k) with k in 3, 5, 7, dtype of ``x``.
        bias: (C,), dtype of ``x``.
        stride: 1 or 2, or a pair of either.
        same_padding: pad as TensorFlow's "same" does, and timm's Conv2dSame: at stride 2, a dimension of even size with
            k // 2 - 1 zeros before it and k // 2 behind it, and all else as without.
        backend: "auto", "reference", "cpu" or "cuda". "auto" runs ``F.conv2d`` itself where no kernels can run, in exported
            graphs, under torch.func and on subclasses of tensors.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), or without N; dtype of ``x``, that of autocast under it. The memory
        format is that of ``F.conv2d``: channels_last where ``x`` or ``weight`` is, which saves a copy each way. Sums are
        taken in float32 (float64 for float64). Deterministic. Gradients are in the dtypes and strides of what they belong
        to, and can be differentiated again, by plain PyTorch.

    Raises:
        TypeError: a tensor that is not floating point, tensors of several dtypes outside of autocast, or a stride that is
            no integer.
        ValueError: another shape, kernel or stride, tensors on several devices, or no such backend.
        RuntimeError: the named backend cannot run on the device of ``x``, or under torch.func.
    """
    stride = checks.depthwise_stride(stride)
    if not tracing.exporting(x):
        checks.depthwise_tensors(x, weight, bias)
        chosen = backends.choose(backend, x.device, "depthwise")
        if not _needs_plain_convolution(x, weight, bias, backend, chosen):
            return convolution.convolve_images(x, weight, bias, stride, same_padding, chosen)
    padding, around = weight.shape[-1] // 2, depthwise_reference.zeros_around(x, weight.shape[-1], stride, same_padding)
    if around is not None:
        x, padding = F.pad(x, around), 0
    return F.conv2d(x, weight, bias, stride, padding=padding, groups=weight.shape[0])


def _needs_plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, chosen: str) -> bool:
    """Whether PyTorch's own convolution is to run.

    Raises:
        RuntimeError: it would have to, and another backend was named.
    """
    if tracing.transformed(x, weight, bias):
        return chosen == "reference" or _under_transform(backend) == "reference"
    if backend != "auto":
        return False
    plain_tensors = all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.layout is torch.strided) for t in (x, weight, bias)
    )
    return chosen == "reference" or not plain_tensors


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
    """Check, choose the backend, run it: (loss, weight), or (loss,) where no weight is wanted.

    ``running_min`` is moved in place; None stands for the local mode. A training step pays for every line on the way of
    plain arguments, contiguous scores and class targets among them: the features push the code out of the caches. So the
    compiled kernels check those, and what is wrong is looked for in Python once they refuse.
    """
    chosen = backends.choose(backend, output.device)
    if chosen != "reference" and not torch.compiler.is_compiling() and bias_loss_op.transforms_are_active():
        chosen = _under_transform(backend)
    plain = (
        chosen in backends.COMPILED
        and type(output) is type(target) is type(features) is Tensor
        and target.dtype is torch.int64
        and output.dim() == 2
        and variance is weight is process_group is None
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
        results = bias_loss_reference.bias_loss(*before, output, *after)
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


def _under_transform(backend: str) -> str:
    """The backend inside torch.func's transforms, which only plain PyTorch has rules for."""
    if backend != "auto":
        raise RuntimeError(
            f"backend {backend!r} cannot run under torch.func (grad, vmap, jvp): its kernels have no rules for transforms; "
            "use backend='reference'"
        )
    return "reference"


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
        variance, extrema = _variance_and_extrema(features, backend)
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


def _variance_and_extrema(features: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    variance, extrema = feature_variance_op.feature_variance(features.detach(), backend=backend)
    return variance, extrema
