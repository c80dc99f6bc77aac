"""``biasloss_ext::pointwise`` and its backward: declarations.

`biasloss_ext.ops.maps` defines affine, moments, statistics and coefficients.

pointwise: ``y = output_act(conv(gate * act(affine(x)), weight) + bias) + residual``.
    x (N, C, H, W) channels_last; weight (K, C, 1, 1) and bias (K,) in the accumulation dtype; gate (N, C), accumulation dtype;
    residual (N, K, H, W), dtype of x, channels_last. Without an affine, x is used unchanged, and the activation must be the
    identity. y (N, K, H, W), dtype of x, channels_last; statistics (4, K) of y, with no elements if they are not requested.

pointwise_backward: from the gradient at ``BN(y)`` to the gradient at ``h = act(affine(x))``, at the weight and at the gate.
    With y and y_coefficients, dy follows from grad and y (without an activation between them); otherwise ``dy = grad``.
    ``dz = dy @ weight``; grad_x is ``dh = dz * gate + residual_grad``, dtype of x (the derivative of the activation is *not*
    in it); grad_weight (K, C, 1, 1) is ``sum dy (gate * h)``; gate_grad (N, C) is the sum of ``dz * h`` over the
    positions of a sample, with no elements without a gate.
    any_origin: dy sums to zero over all positions, so the gradient of the weight may be computed from x minus any constant per
    channel, which rounds less. Only without affine and gate.
    With moments of x (which require an affine), for the normalization before x, with slope = act'(u):
    without a gate, coefficients (6, C) of ``dh * slope``. With a gate, sums (4, N, C) over the positions of each sample of
    ``dh * slope``, ``slope``, ``dh * slope * (x - mean)`` and ``slope * (x - mean)``. `squeeze_excite_backward` finishes the
    coefficients from them when it knows the gradient ``p`` that the gate's pool adds to all positions of a sample:
    ``sum_n (sums[0] + p * sums[1])`` and ``sum_n (sums[2] + p * sums[3])``. dh before rounding. Deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.pointwise import reference
from biasloss_ext.ops.registry import declare


@declare(
    reference.pointwise,
    "(Tensor x, Tensor weight, *, Tensor? affine=None, int activation=0, Tensor? gate=None, Tensor? bias=None, "
    f"int output_activation=0, Tensor? residual=None, bool want_statistics=False, {maps.NORM}) -> "
    "(Tensor y, Tensor statistics)",
    triton=True,
)
def forward(x: Tensor, weight: Tensor, *, want_statistics: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    y = maps.empty_map(x, weight.shape[0], x.shape[2], x.shape[3])
    return y, maps.none_like(x).new_empty(4, weight.shape[0]) if want_statistics else maps.none_like(x)


@declare(
    reference.pointwise_backward,
    "(Tensor grad, Tensor x, Tensor weight, *, Tensor? y=None, Tensor? y_coefficients=None, Tensor? affine=None, "
    "Tensor? moments=None, int activation=0, Tensor? gate=None, Tensor? residual_grad=None, bool any_origin=False, "
    f"bool want_x=True, bool want_weight=True, {maps.BACK}) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor gate_grad, Tensor sums, Tensor coefficients)",
    triton=True,
)
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    moments: Tensor | None = None,
    gate: Tensor | None = None,
    want_x: bool = True,
    want_weight: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = maps.none_like(x)
    samples, channels = x.shape[:2]
    by_sample = moments is not None and gate is not None
    by_channel = moments is not None and gate is None
    return (
        maps.empty_map(x, *x.shape[1:]) if want_x else x.new_empty(0),
        none.new_empty(weight.shape if want_weight else 0),
        none.new_empty(0) if gate is None else none.new_empty(samples, channels),
        none.new_empty(4, samples, channels) if by_sample else none.new_empty(0),
        none.new_empty(6, channels) if by_channel else none.new_empty(0),
    )
