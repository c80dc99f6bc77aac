"""Pool and variance in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.feature_variance.reference import feature_variance


def pool_variance(x: Tensor, affine: Tensor | None, activation: int, want_variance: bool) -> tuple[Tensor, Tensor]:
    h = maps.activate(maps.normalised(x, affine), activation)
    return h.mean((2, 3)), feature_variance(h)[0] if want_variance else maps.none_like(x)


def pool_variance_backward(
    pool_grad: Tensor, x: Tensor, affine: Tensor | None, center: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    u = maps.normalised(x, affine)
    du = maps.per_channel(pool_grad) / (x.shape[2] * x.shape[3]) * maps.derivative(u, activation)
    sums = maps.none_like(x) if center is None else maps.sums_of(du, x, center)
    return maps.channels_last(du.to(x.dtype)), sums
