"""``biasloss_ext::batch_norm_moments``, ``_apply``, ``_sums`` and ``_backward``: schemas and shape functions.

The words affine, moments, coefficients, sums and center are explained in :mod:`biasloss_ext.ops.maps`. Maps (N, C, H, W) are
channels_last.

batch_norm_moments: moments (2, C) of y.
batch_norm_apply: ``act(affine(y)) + residual``, dtype of y.
batch_norm_sums: sums (2, C) of ``du = grad * act'(affine(y))`` about (y, center).
batch_norm_backward: ``coefficients(du, y)``, the gradient at y, dtype of y. All deterministic.
"""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import reference
from biasloss_ext.ops.dispatch import Op


def _fake_per_channel(y: Tensor) -> Tensor:
    return maps.none_like(y).new_empty(2, y.shape[1])


def _fake_apply(y: Tensor, affine: Tensor, activation: int, residual: Tensor | None) -> Tensor:
    return maps.empty_map(y, *y.shape[1:])


def _fake_sums(grad: Tensor, y: Tensor, affine: Tensor, center: Tensor, activation: int) -> Tensor:
    return _fake_per_channel(y)


def _fake_backward(grad: Tensor, y: Tensor, affine: Tensor, coefficients: Tensor, activation: int) -> Tensor:
    return maps.empty_map(y, *y.shape[1:])


_FAMILY = "batch_norm"
moments = Op(_FAMILY, "batch_norm_moments", "(Tensor y) -> Tensor", _fake_per_channel, reference.batch_norm_moments)
apply = Op(
    _FAMILY,
    "batch_norm_apply",
    "(Tensor y, Tensor affine, int activation, Tensor? residual) -> Tensor",
    _fake_apply,
    reference.batch_norm_apply,
)
sums = Op(
    _FAMILY,
    "batch_norm_sums",
    "(Tensor grad, Tensor y, Tensor affine, Tensor center, int activation) -> Tensor",
    _fake_sums,
    reference.batch_norm_sums,
)
backward = Op(
    _FAMILY,
    "batch_norm_backward",
    "(Tensor grad, Tensor y, Tensor affine, Tensor coefficients, int activation) -> Tensor",
    _fake_backward,
    reference.batch_norm_backward,
)
