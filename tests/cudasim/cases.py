"""Runs the loss kernels in the simulator on torch tensors, and computes in float64 what they should give."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.nn.functional as F

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
# A few schedules: threads in order; in random order with one, two and four blocks side by side.
SCHEDULES = [{"seed": 0}, {"seed": 1, "resident_blocks": 1}, {"seed": 2}, {"seed": 3, "resident_blocks": 4}]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_array(tensor: torch.Tensor | None) -> numpy.ndarray | None:
    """The same memory with the same strides; bfloat16 as uint16, which is all that numpy can hold of it."""
    if tensor is None:
        return None
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@dataclasses.dataclass
class Case:
    """One call of the loss. `features` is (N, n) with each sample one run."""

    output: torch.Tensor
    target: torch.Tensor
    features: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    extrema: torch.Tensor | None = None
    class_weight: torch.Tensor | None = None
    running_min: float | None = None
    alpha: float = 0.3
    beta: float = 0.3
    update_running_min: bool = True
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    multiprocessors: int = 4


@dataclasses.dataclass
class Result:
    loss: torch.Tensor
    weight: torch.Tensor
    grad_output: torch.Tensor
    running_min: float | None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def simulate(
    simulator: ModuleType,
    case: Case,
    schedule: dict[str, Any] | None = None,
    grad_loss: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
) -> Result:
    """Forward and backward through the CUDA kernels."""
    plan = simulator.Schedule(**(schedule or {}))
    dtype, wide = case.output.dtype, accumulator(case.output.dtype)
    running_min = None if case.running_min is None else numpy.array([case.running_min], numpy.float32)
    scores: dict[str, Any] = {
        "output": as_array(case.output),
        "target": as_array(case.target),
        "class_weight": as_array(case.class_weight),
        "ignore_index": case.ignore_index,
        "label_smoothing": case.label_smoothing,
        "dtype": NAMES[dtype],
        "schedule": plan,
    }
    out = simulator.bias_loss(
        features=as_array(case.features),
        variance=as_array(case.variance),
        extrema=as_array(case.extrema),
        running_min=running_min,
        alpha=case.alpha,
        beta=case.beta,
        update_running_min=case.update_running_min,
        reduction=REDUCTIONS[case.reduction],
        multiprocessors=case.multiprocessors,
        **scores,
    )
    shape = case.output.shape[:1] + case.output.shape[2:] if case.reduction == "none" else torch.Size([])
    if grad_loss is None:
        grad_loss = torch.ones((), dtype=wide).expand(shape)
    if grad_output is None:
        grad_output = torch.empty_like(case.output)
    grad_output.fill_(torch.nan)
    simulator.bias_loss_backward(
        grad_loss=as_array(grad_loss),
        weight=out["weight"],
        row_max=out["row_max"],
        row_log_sum=out["row_log_sum"],
        denominator=out["denominator"],
        grad_output=as_array(grad_output),
        **scores,
    )
    return Result(
        loss=torch.from_numpy(out["loss"]).reshape(shape),
        weight=torch.from_numpy(out["weight"]),
        grad_output=grad_output,
        running_min=None if running_min is None else float(running_min[0]),
        extra=out,
    )


def expected_weight(case: Case) -> tuple[torch.Tensor, float | None]:
    """SPEC of the weights, in float64, and the running minimum afterwards."""
    if case.variance is not None:
        variance = case.variance.double()
    else:
        assert case.features is not None
        variance = torch.zeros(len(case.output), dtype=torch.float64)
        if case.features.shape[1] > 1:
            variance = case.features.double().var(dim=1)
    negated_min, largest = -variance.min(), variance.max()
    if case.extrema is not None:
        negated_min, largest = case.extrema.double()
    if not (torch.isfinite(negated_min) and torch.isfinite(largest)) or not torch.isfinite(variance).all():
        return torch.full_like(variance, torch.nan), case.running_min
    smallest = -negated_min
    low, running_min = smallest, case.running_min
    if running_min is not None:
        low = torch.minimum(torch.tensor(running_min, dtype=torch.float64), smallest)
        if case.update_running_min:
            running_min = float(low)
    spread = largest - smallest
    v = torch.zeros_like(variance) if spread == 0 else (variance - low) / spread
    return torch.exp((case.alpha * v).clamp(max=60)) - case.beta, running_min


def expected(case: Case, grad_loss: torch.Tensor | None = None, compute_dtype: torch.dtype = torch.float64) -> Result:
    """torch's own cross-entropy in float64, weighted."""
    weight, running_min = expected_weight(case)
    output = case.output.detach().to(compute_dtype).clone().requires_grad_()
    target = case.target.to(compute_dtype) if case.target.is_floating_point() else case.target.long()
    class_weight = None if case.class_weight is None else case.class_weight.to(compute_dtype)
    loss = F.cross_entropy(
        output,
        target,
        class_weight,
        reduction="none",
        ignore_index=case.ignore_index,
        label_smoothing=case.label_smoothing,
    )
    loss = loss * weight.to(compute_dtype).reshape(-1, *[1] * (loss.dim() - 1))
    if case.reduction != "none":
        loss = loss.sum()
    if case.reduction == "mean":
        counted = torch.ones_like(target, dtype=compute_dtype)
        if case.target.is_floating_point():
            counted = counted.select(1, 0)
        else:
            if class_weight is not None:
                counted = class_weight[target.clamp(min=0)]
            counted = counted * (target != case.ignore_index)
        loss = loss / counted.sum()
    grad = torch.ones((), dtype=compute_dtype) if grad_loss is None else grad_loss.to(compute_dtype)
    loss.backward(grad.expand(loss.shape))
    assert output.grad is not None
    return Result(loss.detach(), weight, output.grad, running_min)


# How far float32 sums, and a gradient rounded to its dtype, may be off: relative, and relative to the largest value.
TOLERANCES = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (2e-5, 2e-6),
    torch.float16: (2e-3, 1e-4),
    torch.bfloat16: (1e-2, 1e-3),
}


def assert_matches(result: Result, reference: Result) -> None:
    dtype = result.grad_output.dtype
    wide = accumulator(dtype)
    check_close(result.weight, reference.weight, *TOLERANCES[wide])
    check_close(result.loss, reference.loss, *TOLERANCES[wide])
    check_close(result.grad_output, reference.grad_output, *TOLERANCES[dtype])
    assert (result.running_min is None) == (reference.running_min is None)
    if result.running_min is not None and reference.running_min is not None:
        numpy.testing.assert_allclose(result.running_min, reference.running_min, rtol=1e-5)


def check_close(got: torch.Tensor, want: torch.Tensor, relative: float, of_largest: float) -> None:
    assert got.shape == want.shape
    finite = want[torch.isfinite(want)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=relative, atol=of_largest * largest, equal_nan=True)


def features(samples: int, activations: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Samples of visibly different variance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, activations, generator=generator, dtype=torch.float64)
    return (x * (1 + torch.arange(samples, dtype=torch.float64))[:, None] + 0.5).to(dtype)


def scores(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def classes(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))
