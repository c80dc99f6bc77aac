"""Pool and variance in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.feature_variance.reference import feature_variance
from biasloss_ext.ops.library import with_arguments_of


class BackwardArguments(NamedTuple):
    """Of ``biasloss_ext::pool_variance_backward``."""

    pool_grad: Tensor
    x: Tensor
    affine: Tensor | None = None
    moments: Tensor | None = None
    activation: int = 0
    eps: float = 1e-5
    frozen: bool = False


def pool_variance(
    x: Tensor, *, affine: Tensor | None = None, activation: int = 0, want_variance: bool = False
) -> tuple[Tensor, Tensor]:
    h = maps.activate(maps.normalized(x, affine), activation)
    return h.mean((2, 3)), feature_variance(h)[0] if want_variance else maps.none_like(x)


@with_arguments_of(BackwardArguments)
def pool_variance_backward(call: BackwardArguments) -> tuple[Tensor, Tensor]:
    x, affine, moments = call.x, call.affine, call.moments
    u = maps.normalized(x, affine)
    du = maps.per_channel(call.pool_grad) / (x.shape[2] * x.shape[3]) * maps.derivative(u, call.activation)
    coefficients = maps.none_like(x)
    if moments is not None:
        assert affine is not None
        coefficients = maps.coefficients_of(du, x, affine, moments, eps=call.eps, frozen=call.frozen)
    return maps.channels_last(du.to(x.dtype)), coefficients
