"""Pool and variance in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.feature_variance.reference import feature_variance


def pool_variance(
    x: Tensor, *, affine: Tensor | None = None, activation: int = 0, want_variance: bool = False
) -> tuple[Tensor, Tensor]:
    h = maps.activate(maps.normalized(x, affine), activation)
    return h.mean((2, 3)), feature_variance(h)[0] if want_variance else maps.none_like(x)


def pool_variance_backward(
    pool_grad: Tensor,
    x: Tensor,
    *,
    affine: Tensor | None = None,
    moments: Tensor | None = None,
    activation: int = 0,
    **back: Any,
) -> tuple[Tensor, Tensor]:
    u = maps.normalized(x, affine)
    du = maps.per_channel(pool_grad) / (x.shape[2] * x.shape[3]) * maps.derivative(u, activation)
    coefficients = maps.none_like(x)
    if moments is not None:
        assert affine is not None
        coefficients = maps.coefficients_of(du, x, affine, moments, **back)
    return maps.channels_last(du.to(x.dtype)), coefficients
