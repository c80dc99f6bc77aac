"""What the ops that finish a batch normalization must have done, in float64 and by torch's own normalization."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops.library import accumulation_dtype


def drawn(channels: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """All options of a normalization after a map of ``dtype``."""
    wide = accumulation_dtype(dtype)

    def normal() -> Tensor:
        return torch.randn(channels, generator=generator, dtype=torch.float64).to(wide)

    return {
        "norm_weight": 1 + 0.2 * normal(),
        "norm_bias": normal(),
        "running_mean": normal(),
        "running_var": normal().square() + 0.1,
        "num_batches_tracked": torch.tensor(3),
        "momentum": 0.3,
        "eps": 1e-3,
    }


def subsets(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options with each of the tensors there or not."""
    tensors = [name for name, value in options.items() if isinstance(value, Tensor)]
    for chosen in product((True, False), repeat=len(tensors)):
        left_out = {name for name, kept in zip(tensors, chosen, strict=True) if not kept}
        yield {name: None if name in left_out else value for name, value in options.items()}


def check_statistics(statistics: Tensor, y: Tensor, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Statistics (4, C) of the stored map ``y``, and running statistics moved, as `F.batch_norm` has them in float64.

    Args:
        before: the options of the normalization with what the op writes as it was before the call.
        after: the same after the call.
    """
    assert statistics.shape == (4, y.shape[1])
    assert statistics.dtype == accumulation_dtype(y.dtype)
    count = y.numel() // max(y.shape[1], 1)
    weight, bias = (None if before.get(k) is None else before[k].double() for k in ("norm_weight", "norm_bias"))
    eps, rounding = before.get("eps", 1e-5), torch.finfo(statistics.dtype).eps
    mean, var, scale, shift = statistics.double().unbind()
    exact = y.double()
    if count > 0:
        largest = exact.abs().amax((0, 2, 3))
        close(mean, exact.mean((0, 2, 3)), 8 * rounding * largest, "mean")
        exact_var = exact.var((0, 2, 3), correction=0)
        # The variance of a constant channel is the square of the rounding of its mean.
        allowed = (2 * rounding * largest).square() + torch.finfo(statistics.dtype).tiny
        if statistics.dtype == torch.float64:
            # The yardstick is rounded as much as what it measures, and so is each deviation from the mean.
            allowed += 1e-11 * exact_var + 4 * rounding * largest * exact_var.sqrt()
        else:
            allowed += 64 * rounding * exact_var
        close(var, exact_var, allowed, "variance")
    else:
        assert not statistics[:2].any()
    # Of the moments as they were returned: their own errors are checked above.
    exact_scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
    close(scale, exact_scale, 8 * rounding * exact_scale.abs(), "scale")
    exact_shift = (0 if bias is None else bias) - exact_scale * mean
    close(shift, exact_shift, 8 * rounding * ((exact_scale * mean).abs() + exact_shift.abs()), "shift")
    check_running(statistics, y, count, before, after)


def check_running(
    statistics: Tensor, y: Tensor | None, count: int, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """The running statistics have moved as `F.batch_norm` moves them over y, or towards the moments in ``statistics``."""
    rounding, momentum = torch.finfo(statistics.dtype).eps, before.get("momentum", 0.1)
    if before.get("num_batches_tracked") is not None:
        assert after["num_batches_tracked"].item() == before["num_batches_tracked"].item() + 1
    mean, var = statistics[:2].double().unbind()
    towards = {"running_mean": mean, "running_var": var * (count / max(count - 1, 1))}
    for name, value in towards.items():
        old, new = before.get(name), after.get(name)
        if old is None or (count == 1 and name == "running_var"):  # no variance: the layers refuse such a batch
            continue
        assert new is not None
        if count == 0:
            assert torch.equal(new, old), name
            continue
        expected = (1 - momentum) * old.double() + momentum * value
        close(new.double(), expected, 8 * rounding * (old.double().abs() + value.abs()), name)
    if y is not None and count > 1 and before.get("running_mean") is not None and before.get("running_var") is not None:
        moved = [before[name].double() for name in towards]
        F.batch_norm(y.double(), *moved, training=True, momentum=momentum)
        for name, expected in zip(towards, moved, strict=True):
            largest = y.double().square().amax((0, 2, 3)) if name == "running_var" else y.double().abs().amax((0, 2, 3))
            close(after[name].double(), expected, 64 * rounding * (largest + before[name].double().abs()), name)


def check_coefficients(
    coefficients: Tensor, du: Tensor, y: Tensor, weight: Tensor | None, eps: float, frozen: bool
) -> None:
    """Coefficients (6, C) against the autograd of `F.batch_norm` in float64.

    Args:
        du: the gradient at the output of the normalization.
        y: its input; the coefficients were finished with its own moments, or these as constants where ``frozen``.
        weight: of the normalization.
    """
    channels = y.shape[1]
    assert coefficients.shape == (6, channels)
    du, exact = du.detach().double(), y.detach().double().clone().requires_grad_()
    gamma = (torch.ones(channels) if weight is None else weight.detach()).double().clone().requires_grad_()
    beta = torch.zeros(channels, dtype=torch.float64, requires_grad=True)
    moments = (exact.detach().mean((0, 2, 3)), exact.detach().var((0, 2, 3), correction=0))
    u = F.batch_norm(exact, *(moments if frozen else (None, None)), gamma, beta, training=not frozen, eps=eps)
    dy, of_weight, of_bias = torch.autograd.grad(u, (exact, gamma, beta), du)
    a, b, c, center = (row.double()[:, None, None] for row in coefficients[:4])
    rounding = torch.finfo(coefficients.dtype).eps
    normalized = (u - beta.detach()[:, None, None]).abs() / gamma.abs()[:, None, None]
    terms = ((du * normalized).abs().sum((0, 2, 3)), du.abs().sum((0, 2, 3)))
    # Each term of the sums is rounded, and so is the mean that is taken off it.
    of_mean = 1 + moments[0].abs() / (moments[1] + eps).sqrt()
    close(coefficients[4].double(), of_weight, 16 * rounding * (terms[0] + terms[1] * of_mean), "weight gradient")
    close(coefficients[5].double(), of_bias, 16 * rounding * terms[1], "bias gradient")
    found = a * du + b * (exact.detach() - center) + c
    close(found, dy, 64 * rounding * (dy.abs().amax() + du.abs().amax() * of_mean.amax()), "dy")
    if frozen:
        assert not coefficients[1:3].any()


def close(ours: Tensor, truth: Tensor, allowed: Tensor | float, what: str) -> None:
    """Each element to within its own bound, or the smallest normal number of float32: what is smaller has fewer digits."""
    assert ours.shape == truth.shape, what
    excess = (ours - truth).detach().abs() - allowed - torch.finfo(torch.float32).smallest_normal
    assert not ours.isnan().any(), what
    assert bool((excess <= 0).all()), f"{what}: over its bound by {excess.max().item():.3g}"
