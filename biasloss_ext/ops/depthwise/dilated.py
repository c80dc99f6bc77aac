"""Dilated depthwise convolutions by the kernels of plain ones.

A convolution of dilation d and stride 1 takes every d-th row and column: it is d * d plain convolutions, one for each pair of
first row and first column ("phases"), of maps d times smaller. Each phase is copied out, computed, and copied back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.depthwise import op


def _phases(dilation: int, *tensors: Tensor | None) -> Iterator[tuple[tuple[slice, ...], tuple[Tensor | None, ...]]]:
    """Where each phase lies, and the phases of the tensors; a map that has no such row or column has none."""
    first = next(t for t in tensors if t is not None)
    for row in range(min(dilation, first.shape[2])):
        for column in range(min(dilation, first.shape[3])):
            where = (slice(None), slice(None), slice(row, None, dilation), slice(column, None, dilation))
            yield where, tuple(None if t is None else maps.channels_last(t[where]) for t in tensors)


def forward(
    x: Tensor, weight: Tensor, *, dilation: int, want_statistics: bool = False, backend: str = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """As `op.forward`, of which the arguments are, with stride 1."""
    on_load = {name: options.pop(name) for name in ("affine", "activation") if name in options}
    y = maps.empty_map(x, *x.shape[1:])
    for where, (phase,) in _phases(dilation, x):
        y[where] = op.forward(phase, weight, **on_load, backend=backend)[0]
    return y, batch_norm.statistics(y, **options, backend=backend) if want_statistics else maps.none_like(x)


def backward(
    x: Tensor,
    weight: Tensor,
    *,
    dilation: int,
    grad: Tensor,
    residual_grad: Tensor | None = None,
    affine: Tensor | None = None,
    moments: Tensor | None = None,
    activation: int = maps.IDENTITY,
    backend: str = "auto",
    **back: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `op.backward` without y, with stride 1."""
    grad_x = maps.empty_map(x, *x.shape[1:])
    grad_weight = torch.zeros_like(weight)
    for where, (of_x, of_grad, of_residual) in _phases(dilation, x, grad, residual_grad):
        run: dict[str, Any] = {
            "affine": affine,
            "activation": activation,
            "residual_grad": of_residual,
            "backend": backend,
        }
        grad_x[where], of_weight, _ = op.backward(of_x, weight, grad=of_grad, **run)
        grad_weight += of_weight
    if moments is None:
        return grad_x, grad_weight, maps.none_like(x)
    assert affine is not None
    # grad_x is the gradient at u already.
    return grad_x, grad_weight, batch_norm.coefficients(grad_x, x, affine, moments, **back, backend=backend)
