"""``biasloss_ext::pool_variance`` and its backward: schemas and shape functions.

The words affine, sums and center are explained in :mod:`biasloss_ext.ops.maps`.

pool_variance: ``h = act(affine(x))``; pooled (N, C), the mean of h over a sample's positions, and variance (N,), the unbiased
    variance over all C * H * W activations of a sample (:func:`biasloss_ext.feature_variance` of h), both in the accumulation
    dtype; no elements where the variance is not wanted (the pool of a squeeze-and-excitation). x (N, C, H, W) channels_last.

pool_variance_backward: ``du = pool_grad / (H * W) * act'(u)``, dtype of x, channels_last, and the sums of du about
    (x, center), no elements where center is None. The variance is a constant. Deterministic.
"""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.dispatch import Op
from biasloss_ext.ops.pool_variance import reference

SIGNATURE = "(Tensor x, Tensor? affine, int activation, bool want_variance) -> (Tensor pooled, Tensor variance)"
SIGNATURE_OF_BACKWARD = (
    "(Tensor pool_grad, Tensor x, Tensor? affine, Tensor? center, int activation) -> (Tensor grad_x, Tensor sums)"
)


def _fake(x: Tensor, affine: Tensor | None, activation: int, want_variance: bool) -> tuple[Tensor, Tensor]:
    none = maps.none_like(x)
    return none.new_empty(x.shape[:2]), none.new_empty(x.shape[0]) if want_variance else none


def _fake_backward(
    pool_grad: Tensor, x: Tensor, affine: Tensor | None, center: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    none = maps.none_like(x)
    return maps.empty_map(x, *x.shape[1:]), none if center is None else none.new_empty(2, x.shape[1])


forward = Op("pool_variance", "pool_variance", SIGNATURE, _fake, reference.pool_variance)
backward = Op(
    "pool_variance", "pool_variance_backward", SIGNATURE_OF_BACKWARD, _fake_backward, reference.pool_variance_backward
)
