"""Bias Loss in plain PyTorch: the fallback on every device and the oracle of the tests.

Differentiable by PyTorch itself, any number of times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops.feature_variance.reference import extrema_of, feature_variance
from biasloss_ext.ops.library import accumulation_dtype, with_arguments_of

NONE, MEAN, SUM = 0, 1, 2
LARGEST_EXPONENT = 60.0  # exp(60) = 1e26 still leaves room for the loss in float32


def weight_formula(scaled: Tensor, alpha: float, beta: float) -> Tensor:
    """The weight of a sample, from its normalized variance v."""
    return torch.exp((alpha * scaled).clamp(max=LARGEST_EXPONENT)) - beta


def bias_weight(
    variance: Tensor,
    extrema: Tensor,
    running_min: Tensor | None,
    alpha: float,
    beta: float,
    update_running_min: bool,
) -> Tensor:
    """The weight of every sample; moves ``running_min`` in place where asked to."""
    smallest, largest = -extrema[0], extrema[1]
    finite = extrema.isfinite().all()
    low = smallest
    if running_min is not None:
        # fmin: a running minimum that is NaN does not stay.
        low = torch.fmin(running_min.to(smallest.dtype), smallest)
        if update_running_min:
            moved = torch.fmin(running_min, smallest.to(running_min.dtype))
            running_min.copy_(torch.where(finite, moved, running_min))
    spread = largest - smallest
    scaled = torch.where(spread == 0, torch.zeros_like(variance), (variance - low) / spread)
    return torch.where(finite, weight_formula(scaled, alpha, beta), torch.nan)


def cross_entropy(
    output: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every position, and how much each counts in the denominator of the mean."""
    scores = output.to(accumulation_dtype(output.dtype))
    classes = scores.shape[1]
    if target.is_floating_point():
        losses = F.cross_entropy(
            scores, target.to(scores.dtype), class_weight, reduction="none", label_smoothing=label_smoothing
        )
        return losses, torch.ones_like(losses)
    target = target.long()
    counted = target != ignore_index
    valid = (target >= 0) & (target < classes)
    known = torch.where(counted & valid, target, 0)
    losses = F.cross_entropy(
        scores, known, class_weight, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    )
    counts = torch.ones_like(losses) if class_weight is None else class_weight[known]
    # An invalid class makes the loss NaN, and by the product its gradient too. An ignored one must not hand on the NaN
    # of its scores, so its loss is replaced, not multiplied.
    losses = losses * torch.where(valid | ~counted, 1.0, torch.nan).to(losses.dtype)
    return torch.where(counted, losses, 0.0), torch.where(counted, counts, 0.0)


class Arguments(NamedTuple):
    """Of ``biasloss_ext::bias_loss``."""

    features: Tensor | None
    variance: Tensor | None
    extrema: Tensor | None
    output: Tensor
    target: Tensor
    class_weight: Tensor | None
    running_min: Tensor | None
    alpha: float
    beta: float
    update_running_min: bool
    reduction: int
    ignore_index: int
    label_smoothing: float


class BackwardArguments(NamedTuple):
    """Of ``biasloss_ext::bias_loss_backward``."""

    grad_loss: Tensor
    output: Tensor
    target: Tensor
    class_weight: Tensor | None
    weight: Tensor
    statistics: Tensor
    reduction: int
    ignore_index: int
    label_smoothing: float


def loss_and_weight(call: Arguments) -> tuple[Tensor, Tensor]:
    variance, extrema = call.variance, call.extrema
    if variance is None:
        assert call.features is not None
        variance, extrema = feature_variance(call.features)
    elif extrema is None:
        extrema = extrema_of(variance)
    assert extrema is not None
    losses, counts = _cross_entropy_of(call, call.output)
    dtype = losses.dtype
    weight = bias_weight(
        variance.to(dtype), extrema.to(dtype), call.running_min, call.alpha, call.beta, call.update_running_min
    )
    weighted = weight.view(-1, *[1] * (losses.dim() - 1)) * losses
    if call.reduction == NONE:
        return weighted, weight
    if call.reduction == SUM:
        return weighted.sum(), weight
    return weighted.sum() / counts.sum(), weight


def _cross_entropy_of(call: Arguments | BackwardArguments, output: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(output, call.target, call.class_weight, call.ignore_index, call.label_smoothing)


@with_arguments_of(Arguments)
def bias_loss(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """``biasloss_ext::bias_loss``: with what the backward op needs of the forward pass."""
    loss, weight = loss_and_weight(call)
    output = call.output.detach()
    scores = output.to(loss.dtype).movedim(1, -1)
    largest = scores.amax(-1).flatten() if scores.numel() else scores.new_empty(0)
    log_sum = (scores.flatten(0, -2) - largest[:, None]).exp().sum(-1).log()
    denominator = scores.new_ones(())
    if call.reduction == MEAN:
        denominator = _cross_entropy_of(call, output)[1].sum()
    return loss, weight, torch.cat((denominator[None], largest, log_sum))


@with_arguments_of(BackwardArguments)
def bias_loss_backward(call: BackwardArguments) -> Tensor:
    """``biasloss_ext::bias_loss_backward``"""
    with torch.enable_grad():
        leaf = call.output.detach().requires_grad_()
        losses, _ = _cross_entropy_of(call, leaf)
        weighted = call.weight.view(-1, *[1] * (losses.dim() - 1)) * losses
        if call.reduction == MEAN:
            weighted = weighted / call.statistics[0]
        return torch.autograd.grad((weighted * call.grad_loss).sum(), leaf)[0]
