"""Bias Loss in float64, written from the formulas alone: what every backend is compared with.

Only the weight's own formula is that of the package, here on float64 (`test_check_figures_of_the_weights` has the paper's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops.bias_loss.reference import weight_formula


@dataclass
class Expected:
    loss: Tensor
    gradient: Tensor
    weight: Tensor
    running_min: Tensor | None


def variance(features: Tensor) -> Tensor:
    rows = features.detach().double().reshape(features.shape[0], math.prod(features.shape[1:]))
    return rows.var(1, correction=1) if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])


def weights(var: Tensor, running_min: Tensor | None, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
    """The weights, and the running minimum after this batch."""
    smallest, largest = var.min(), var.max()
    low = smallest if running_min is None else torch.minimum(running_min.double(), smallest)
    scaled = torch.zeros_like(var) if largest == smallest else (var - low) / (largest - smallest)
    return weight_formula(scaled, alpha, beta), None if running_min is None else low


def bias_loss(
    var: Tensor,
    output: Tensor,
    target: Tensor,
    running_min: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.3,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Expected:
    """Op by op in ``dtype``: the truth in float64, and torch's own rounding in float32."""
    scores = output.detach().to(dtype).requires_grad_()
    w, moved = weights(var, running_min, alpha, beta)
    w = w.to(dtype)
    class_weight = None if weight is None else weight.to(dtype)
    probabilities = target.is_floating_point()
    losses = F.cross_entropy(
        scores,
        target.to(dtype) if probabilities else target.long(),
        class_weight,
        reduction="none",
        label_smoothing=label_smoothing,
        **({} if probabilities else {"ignore_index": ignore_index}),
    )
    loss = losses * w.view(-1, *[1] * (losses.dim() - 1))
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / denominator(output, target, class_weight, ignore_index)
    # A gradient of ones for "none" would hide a kernel that reads one value for all.
    (gradient,) = torch.autograd.grad(loss, scores, grad_of_loss(loss))
    return Expected(loss.detach(), gradient, w, moved)


def denominator(output: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor | float:
    if target.is_floating_point():
        return output.numel() / output.shape[1]
    counted = target.long() != ignore_index
    if class_weight is None:
        return counted.sum()
    return class_weight[torch.where(counted, target.long(), 0)][counted].sum()


def grad_of_loss(loss: Tensor) -> Tensor:
    """Different for every element, the same for every backend."""
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss.dtype)


# What SPEC.md promises of the variance of features up to float32; float64 is held to as many of its own roundings.
VARIANCE_ERROR = 1e-5


def variance_error(dtype: torch.dtype) -> float:
    if dtype != torch.float64:
        return VARIANCE_ERROR
    roundings = VARIANCE_ERROR / torch.finfo(torch.float32).eps
    return 2 * roundings * torch.finfo(dtype).eps  # the yardstick is rounded as well


def error_of_weights(
    var: Tensor, running_min: Tensor | None, alpha: float, beta: float, relative: float, dtype: torch.dtype
) -> Tensor:
    """How far weights computed in ``dtype`` may be off when every variance is off by up to ``relative``, (N,).

    With d for ``relative`` and R = max - min, the numerator of v = (var - low) / R is off by d (var + low) at most, the
    denominator by d (max + min), which is r of it. So v is off by (d (var + low) / R + r v) / (1 - r), and by anything
    for r >= 1, where the batch has no spread that such variances could tell from none.
    """
    rounding = torch.finfo(dtype).eps
    smallest, largest = var.min(), var.max()
    low = smallest if running_min is None else torch.minimum(running_min.double(), smallest)
    spread = largest - smallest
    if spread == 0:  # one sample, or one activation in each
        scaled, scaled_error = torch.zeros_like(var), torch.zeros_like(var)
    else:
        scaled = (var - low) / spread
        of_spread = relative * (largest + smallest) / spread
        scaled_error = (relative * (var + low) / spread + of_spread * scaled) / (1 - of_spread).clamp(min=1e-300)
    # Difference, quotient and product are rounded; so are the formula's terms and what is left after beta.
    weight = weight_formula(scaled, alpha, beta)
    highest = weight_formula(scaled + scaled_error + 2 * rounding * scaled, alpha, beta)
    return (highest - weight).abs() + 4 * rounding * (weight.abs() + 2 * abs(beta))


def assert_as_close_as_torch(
    ours: Tensor, truth: Tensor, torch_own: Tensor, scale: float, what: str, inherited: float = 0.0
) -> None:
    """The largest error is at most twice torch's own, plus four roundings of the terms it is made of (``scale``), plus
    what is off by the error of the inputs (``inherited``)."""
    if truth.numel() == 0:
        assert ours.shape == truth.shape
        return
    rounding = torch.finfo(ours.dtype).eps
    # Where torch reads memory that nobody wrote, and finds NaN there, it gives no measure: oneDNN's bfloat16 gradient of a
    # depthwise kernel wider than the image does, on CPUs with AVX-512.
    own = (torch_own.double() - truth).abs().nan_to_num(nan=0.0).amax().item()
    error = (ours.double() - truth).abs().amax().item()
    bound = 2 * own + 4 * rounding * max(scale, truth.abs().amax().item()) + inherited
    assert error <= bound, f"{what}: error {error:.3g}, torch's own {own:.3g}, bound {bound:.3g}"
