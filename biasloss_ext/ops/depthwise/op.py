"""``biasloss_ext::depthwise`` and its backward: schemas and shape functions.

The words affine, moments, coefficients, sums and center are explained in :mod:`biasloss_ext.ops.maps`.

depthwise: ``y = conv(act(affine(x)), weight)``, zero padding of half the kernel *behind* the activation.
    x (N, C, H, W) channels_last; weight (C, 1, k, k), k in 3, 5, 7, accumulation dtype; affine None: x is taken as it is and
    the activation must be the identity. y (N, C, ceil(H / stride), ceil(W / stride)), dtype of x, channels_last; moments of y,
    or no elements where they are not wanted.

depthwise_backward: from the gradient at ``h2 = act(affine(y))`` to the gradient at ``u = affine(x)`` and at the weight.
    With y given: ``u2 = y_affine(y)``, ``dh2 = grad + pool_grad / (H' * W')`` (either may be None), ``du2 = dh2 * act'(u2)``,
    ``dy = coefficients(du2, y)``. Without y: ``dy = grad``, and pool_grad, y_affine and y_coefficients are None.
    Then ``dh`` is the data gradient of the convolution at dy and ``du = dh * act'(u)``, u = x where affine is None.
    grad_x is du, dtype of x; grad_weight (C, 1, k, k) in the accumulation dtype; sums of du about (x, center), or no elements
    where center is None; either gradient has no elements where it is not wanted. Deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import reference
from biasloss_ext.ops.dispatch import Op

SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor? affine, int activation, int stride, bool want_moments) -> "
    "(Tensor y, Tensor moments)"
)
SIGNATURE_OF_BACKWARD = (
    "(Tensor? grad, Tensor? pool_grad, Tensor? y, Tensor? y_affine, Tensor? y_coefficients, int y_activation, Tensor x, "
    "Tensor weight, Tensor? affine, Tensor? center, int activation, int stride, bool want_x, bool want_weight) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor sums)"
)


def output_size(size: int, stride: int) -> int:
    """ceil(size / stride)"""
    return (size + stride - 1) // stride


def _fake(
    x: Tensor, weight: Tensor, affine: Tensor | None, activation: int, stride: int, want_moments: bool
) -> tuple[Tensor, Tensor]:
    y = maps.empty_map(x, x.shape[1], output_size(x.shape[2], stride), output_size(x.shape[3], stride))
    return y, maps.none_like(x).new_empty(2, x.shape[1]) if want_moments else maps.none_like(x)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, center, *_, want_x, want_weight = arguments[6:]
    none = maps.none_like(x)
    grad_x = maps.empty_map(x, *x.shape[1:]) if want_x else x.new_empty(0)
    grad_weight = none.new_empty(weight.shape if want_weight else 0)
    return grad_x, grad_weight, none if center is None else none.new_empty(2, x.shape[1])


forward = Op("depthwise", "depthwise", SIGNATURE, _fake, reference.depthwise)
backward = Op("depthwise", "depthwise_backward", SIGNATURE_OF_BACKWARD, _fake_backward, reference.depthwise_backward)
