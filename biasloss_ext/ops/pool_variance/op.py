"""``biasloss_ext::pool_variance`` and its backward: declarations.

`biasloss_ext.ops.maps` defines affine, moments and coefficients.

pool_variance: with ``h = act(affine(x))``, pooled (N, C) is the mean of h over the positions of a sample, and variance (N,)
    is the unbiased variance over all C * H * W activations of a sample (`biasloss_ext.feature_variance` of h), both in the
    accumulation dtype. The variance has no elements if it is not requested (the pool of a squeeze-and-excitation). x (N, C,
    H, W) channels_last.

pool_variance_backward: ``du = pool_grad / (H * W) * act'(u)``, dtype of x, channels_last, and the coefficients (6, C) of the
    normalization whose moments are given, with no elements without moments. The variance is a constant. Deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.pool_variance import reference
from biasloss_ext.ops.registry import declare


@declare(
    reference.pool_variance,
    "(Tensor x, *, Tensor? affine=None, int activation=0, bool want_variance=False) -> (Tensor pooled, Tensor variance)",
    triton=True,
)
def forward(x: Tensor, *, want_variance: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    none = maps.none_like(x)
    return none.new_empty(x.shape[:2]), none.new_empty(x.shape[0]) if want_variance else none


@declare(
    reference.pool_variance_backward,
    "(Tensor pool_grad, Tensor x, *, Tensor? affine=None, Tensor? moments=None, int activation=0, "
    f"{maps.BACK}) -> (Tensor grad_x, Tensor coefficients)",
    triton=True,
)
def backward(pool_grad: Tensor, x: Tensor, *, moments: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    none = maps.none_like(x)
    return maps.empty_map(x, *x.shape[1:]), none if moments is None else none.new_empty(6, x.shape[1])
