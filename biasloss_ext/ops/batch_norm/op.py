"""``biasloss_ext::batch_norm_moments``, ``_apply``, ``_sums``, ``_backward``, ``_affine`` and ``_coefficients``: schemas
and shape functions.

The words affine, moments, coefficients, sums and center are explained in :mod:`biasloss_ext.ops.maps`. Maps (N, C, H, W) are
channels_last.

batch_norm_moments: moments (2, C) of y.
batch_norm_apply: ``act(affine(y)) + residual``, dtype of y.
batch_norm_sums: sums (2, C) of ``du = grad * act'(affine(y))`` about (y, center).
batch_norm_backward: ``coefficients(du, y)``, the gradient at y, dtype of y. All deterministic.

On values per channel alone; one op each, because a chain of torch's would cost more than the work:
batch_norm_affine: affine (2, C) of moments (2, C), and of weight (C,) and bias (C,), ones and zeros where None.
batch_norm_coefficients: coefficients (4, C), and parameter_grads (2, C), the gradients of weight and bias, of sums and
affine over a map of ``count`` values a channel. moments are what affine was made of, center of the sums is their mean;
frozen: they are running statistics, through which no gradient flows.
"""

from __future__ import annotations

import torch
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


def _fake_affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(moments)


def _fake_coefficients(
    sums: Tensor, affine: Tensor, moments: Tensor, eps: float, count: int, frozen: bool
) -> tuple[Tensor, Tensor]:
    return sums.new_empty(4, sums.shape[1]), torch.empty_like(sums)


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
affine = Op(
    "batch_norm_channels",
    "batch_norm_affine",
    "(Tensor moments, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _fake_affine,
    reference.batch_norm_affine,
)
coefficients = Op(
    "batch_norm_channels",
    "batch_norm_coefficients",
    "(Tensor sums, Tensor affine, Tensor moments, float eps, SymInt count, bool frozen)"
    " -> (Tensor coefficients, Tensor parameter_grads)",
    _fake_coefficients,
    reference.batch_norm_coefficients,
)
