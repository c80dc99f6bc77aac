"""Bias Loss, its parts and the depthwise convolution as functions without state."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext import checks
from biasloss_ext.ops import backends, tracing
from biasloss_ext.ops.bias_loss import reference as bias_loss_reference
from biasloss_ext.ops.depthwise import convolution
from biasloss_ext.ops.depthwise import reference as depthwise_reference
from biasloss_ext.ops.feature_variance import reference as feature_variance_reference
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.weighting import variance_and_extrema, weighted_cross_entropy

__all__ = ["BiasLossOutput", "bias_loss", "bias_weight", "depthwise_conv2d", "feature_variance"]


class BiasLossOutput(NamedTuple):
    """The result of `bias_loss`.

    Attributes:
        loss: the reduced loss, or (N, *d) for ``reduction="none"``; float32, float64 for float64 scores.
        weight: w_i of each sample, (N,), detached, dtype of ``loss``.
        running_min: the updated running minimum, 0-d float32; None in local mode.
    """

    loss: Tensor
    weight: Tensor
    running_min: Tensor | None


def feature_variance(features: Tensor, *, backend: str = "auto") -> Tensor:
    """Unbiased variance (divisor n - 1) over all n activations of each sample; 0 if n is 1.

    Args:
        features: (N, *) of float16, bfloat16, float32 or float64. Contiguous, channels_last and all other layouts
            with dense samples are read in place; others are copied once. Treated as a constant.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        (N,) in float32 (float64 for float64 features), detached. The relative error is at most 1e-5 up to mean/std = 1000.
        NaN for a sample with NaN or infinite activations. Deterministic.

    Raises:
        TypeError: ``features`` is not a floating-point tensor.
        ValueError: ``features`` has no batch dimension or no activations, or the backend is unknown.
        RuntimeError: the named backend cannot run on this device.
    """
    checks.features(features)
    return variance_and_extrema(features, backends.choose(backend, features.device))[0]


def bias_weight(
    variance: Tensor,
    running_min: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.3,
) -> Tensor:
    """The weights of Bias Loss: ``w_i = exp(alpha * v_i) - beta`` with ``v_i = (variance_i - low) / (max - min)``.

    ``low`` is the smallest variance of the batch or, if a running minimum is given (the "global" mode), the smaller of the
    two. If all variances are equal, v is 0. ``alpha * v`` is capped at 60. If any variance is not finite, all weights are NaN.
    Source: Abrahamyan et al., "Bias Loss for Mobile Neural Networks", ICCV 2021, with the constants of the authors'
    current code. Multiply the weights with any loss that has one value per sample.

    Args:
        variance: (N,), floating point, as `feature_variance` returns it.
        running_min: 0-d, not changed.
        alpha: at least 0.
        beta: below 1.

    Returns:
        (N,) in float32 (float64 for float64 variances), detached.

    Raises:
        TypeError: an argument of another type; the message has what was given.
        ValueError: an argument of another shape or value, or tensors on several devices.
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

    The arguments, formulas, shapes and errors are those of `FusedBiasLoss`, except for ``running_min``: the smallest
    variance seen so far, 0-d float32, or None to start at infinity. The tensor does not change; the result has the updated
    one. Local mode ignores it.

    Returns:
        Loss, weights, and the running minimum to pass to the next call.
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
    """``F.conv2d(x, weight, bias, stride, padding=k // 2, groups=C)`` on the depthwise kernels.

    Args:
        x: (N, C, H, W) or (C, H, W) of float16, bfloat16, float32 or float64, any layout.
        weight: (C, 1, k, k) with k = 3, 5 or 7, dtype of ``x``.
        bias: (C,), dtype of ``x``.
        stride: 1 or 2, or a pair of either.
        same_padding: pad like TensorFlow's "same" and timm's Conv2dSame. At stride 2, a dimension of even size gets
            k // 2 - 1 zeros before it and k // 2 after it. Otherwise it changes nothing.
        backend: "auto", "reference", "cpu" or "cuda". "auto" runs ``F.conv2d`` if no kernels can run, in exported graphs,
            under torch.func and on tensor subclasses.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), or without N, in the dtype of ``x``, or of autocast if that is on. The
        memory format is that of ``F.conv2d``: channels_last if ``x`` or ``weight`` is, which saves a copy each way. Sums are
        accumulated in float32 (float64 for float64). Deterministic. Gradients have the dtypes and strides of their tensors,
        and can be differentiated again, by plain PyTorch.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ outside of autocast, or the stride is not an integer.
        ValueError: unsupported shape, kernel or stride, tensors on several devices, or unknown backend.
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
    """Whether PyTorch's own convolution has to run.

    Raises:
        RuntimeError: it has to, but another backend was named.
    """
    if tracing.transformed(x, weight, bias):
        return chosen == "reference" or backends.under_transform(backend) == "reference"
    if backend != "auto":
        return False
    plain_tensors = all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.layout is torch.strided) for t in (x, weight, bias)
    )
    return chosen == "reference" or not plain_tensors
