"""``biasloss_ext::pointwise`` and its backward: schemas and shape functions.

The words affine, moments, coefficients, sums and center are explained in :mod:`biasloss_ext.ops.maps`.

pointwise: ``y = output_act(conv(gate * act(affine(x)), weight) + bias) + residual``.
    x (N, C, H, W) channels_last; weight (K, C, 1, 1) and bias (K,) in the accumulation dtype; gate (N, C), accumulation dtype;
    residual (N, K, H, W), dtype of x, channels_last. affine None: x is taken as it is, the activation must be the identity.
    y (N, K, H, W), dtype of x, channels_last; moments of y, or no elements where they are not wanted.

pointwise_backward: from the gradient at ``BN(y)`` to the gradient at ``h = act(affine(x))``, at the weight and at the gate.
    With y and coefficients: ``dy = coefficients(grad, y)``, no activation between; without: ``dy = grad``.
    ``dz = dy @ weight``; grad_x is ``dh = dz * gate + residual_grad``, dtype of x (the derivative of the activation is *not*
    in it); grad_weight (K, C, 1, 1) is ``sum dy (gate * h)``; gate_grad (N, C) is the sum over a sample's positions of
    ``dz * h``, no elements where gate is None.
    sums (4, N, C), where center is given (then affine is, too): over the positions of each sample, with slope = act'(u):
    ``dh * slope``, ``slope``, ``dh * slope * (x - center)``, ``slope * (x - center)``. With them the sums that the batch
    normalisation before x needs follow for any gradient ``p`` that a pool adds to all of a sample's positions, without
    another pass: ``sum_n (sums[0] + p * sums[1])`` and ``sum_n (sums[2] + p * sums[3])``. dh before rounding. Deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.dispatch import Op
from biasloss_ext.ops.pointwise import reference

SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor? affine, int activation, Tensor? gate, Tensor? bias, int output_activation, "
    "Tensor? residual, bool want_moments) -> (Tensor y, Tensor moments)"
)
SIGNATURE_OF_BACKWARD = (
    "(Tensor grad, Tensor? y, Tensor? coefficients, Tensor x, Tensor weight, Tensor? affine, Tensor? center, int activation, "
    "Tensor? gate, Tensor? residual_grad, bool want_x, bool want_weight) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor gate_grad, Tensor sums)"
)


def _fake(x: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    y = maps.empty_map(x, weight.shape[0], x.shape[2], x.shape[3])
    return y, maps.none_like(x).new_empty(2, weight.shape[0]) if options[-1] else maps.none_like(x)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, _, center, _, gate, _, want_x, want_weight = arguments[3:]
    none = maps.none_like(x)
    samples, channels = x.shape[:2]
    return (
        maps.empty_map(x, *x.shape[1:]) if want_x else x.new_empty(0),
        none.new_empty(weight.shape if want_weight else 0),
        none.new_empty(0) if gate is None else none.new_empty(samples, channels),
        none.new_empty(0) if center is None else none.new_empty(4, samples, channels),
    )


forward = Op("pointwise", "pointwise", SIGNATURE, _fake, reference.pointwise)
backward = Op("pointwise", "pointwise_backward", SIGNATURE_OF_BACKWARD, _fake_backward, reference.pointwise_backward)
