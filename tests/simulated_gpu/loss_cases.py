"""Losses on the simulated GPU, and what they should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from biasloss_ext import functional
from tests import oracle

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """One call of the loss; features (N, n), scores (N, K) or (N, K, S)."""

    features: Tensor
    output: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    running_min: float = 0.5


def features(samples: int, activations: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples of visibly different variance."""
    generator = torch.Generator().manual_seed(activations)
    x = torch.randn(samples, activations, generator=generator, dtype=torch.float64)
    return (x * (1 + torch.arange(samples, dtype=torch.float64))[:, None] + 0.5).to(dtype)


def scores(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def classes(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(below))


def one_row(dtype: torch.dtype = torch.float32, number_of_classes: int = 40, **options: Any) -> Case:
    """A row of scores a sample."""
    output = scores(5, number_of_classes, dtype=dtype)
    return Case(features(5, 3000, dtype), output, classes(5, below=number_of_classes), options)


def dense(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Seventy positions a sample."""
    return Case(features(3, 1000, dtype), scores(3, 11, 70, dtype=dtype), classes(3, 70, below=11), options)


def run(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, weights, gradient, running minimum."""
    output = case.output.detach().requires_grad_()
    loss, weight, moved = functional.bias_loss(
        case.features, output, case.target, torch.tensor(case.running_min), backend="cuda", **case.options
    )
    (gradient,) = torch.autograd.grad(loss, output, oracle.grad_of_loss(loss))
    assert moved is not None
    return loss.detach(), weight, gradient, moved


def check(case: Case) -> None:
    """Against float64."""
    loss, weight, gradient, moved = run(case)
    before = torch.tensor(case.running_min)
    exact = oracle.bias_loss(oracle.variance(case.features), case.output, case.target, before, **case.options)
    wide = torch.float64 if loss.dtype == torch.float64 else torch.float32
    close(weight, exact.weight, TOLERANCES[wide])
    close(loss, exact.loss, TOLERANCES[wide])
    close(gradient, exact.gradient, TOLERANCES[case.output.dtype])
    assert exact.running_min is not None
    torch.testing.assert_close(moved.double(), exact.running_min, rtol=1e-5, atol=0)


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """Relative to the value, or a tenth of that to the largest, or the smallest number of the dtype."""
    atol = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    atol += 0.1 * tolerance * exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=atol)
