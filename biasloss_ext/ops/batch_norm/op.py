"""``biasloss_ext::batch_norm_statistics``, ``_affine``, ``_apply``, ``_coefficients`` and ``_backward``: declarations.

`biasloss_ext.ops.maps` defines affine, moments, statistics and coefficients. Maps (N, C, H, W) are channels_last. Every op is
deterministic.

batch_norm_statistics: statistics (4, C) of y; updates the running statistics.
batch_norm_affine: statistics (4, C) of given moments (2, C) of ``count`` values per channel; updates the running statistics.
batch_norm_apply: ``act(affine(y)) + residual``, dtype of y.
batch_norm_coefficients: coefficients (6, C) of ``du = grad * act'(affine(y))``.
batch_norm_backward: dy from du and coefficients, dtype of y.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import reference
from biasloss_ext.ops.registry import declare


@declare(reference.batch_norm_statistics, f"(Tensor y, *, {maps.NORM}) -> Tensor", triton=True)
def statistics(y: Tensor, **_: Any) -> Tensor:
    return maps.none_like(y).new_empty(4, y.shape[1])


@declare(reference.batch_norm_affine, f"(Tensor moments, SymInt count, *, {maps.NORM}) -> Tensor", triton=True)
def affine(moments: Tensor, count: int, **_: Any) -> Tensor:
    return moments.new_empty(4, moments.shape[1])


@declare(
    reference.batch_norm_apply,
    "(Tensor y, Tensor affine, *, int activation=0, Tensor? residual=None) -> Tensor",
    triton=True,
)
def apply(y: Tensor, affine: Tensor, **_: Any) -> Tensor:
    return maps.empty_map(y, *y.shape[1:])


@declare(
    reference.batch_norm_coefficients,
    f"(Tensor grad, Tensor y, Tensor affine, Tensor moments, *, int activation=0, {maps.BACK}) -> Tensor",
    triton=True,
)
def coefficients(grad: Tensor, y: Tensor, affine: Tensor, moments: Tensor, **_: Any) -> Tensor:
    return moments.new_empty(6, moments.shape[1])


@declare(
    reference.batch_norm_backward,
    "(Tensor grad, Tensor y, Tensor affine, Tensor coefficients, *, int activation=0) -> Tensor",
    triton=True,
)
def backward(grad: Tensor, y: Tensor, affine: Tensor, coefficients: Tensor, **_: Any) -> Tensor:
    return maps.empty_map(y, *y.shape[1:])
