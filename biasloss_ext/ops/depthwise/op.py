"""``biasloss_ext::depthwise`` and its backward: declarations.

`biasloss_ext.ops.maps` defines affine, moments, statistics and coefficients.

depthwise: ``y = conv(act(affine(x)), weight)``, with zero padding by half the kernel *after* the activation. same_padding pads
    like TensorFlow's "same" instead, which differs only at stride 2: a dimension of even size gets k // 2 - 1 zeros before it and
    k // 2 after it.
    x (N, C, H, W) channels_last; weight (C, 1, k, k), k = 3, 5 or 7, accumulation dtype. Without an affine, x is used unchanged,
    and the activation must be the identity. y (N, C, ceil(H / stride), ceil(W / stride)), dtype of x, channels_last; statistics
    (4, C) of y, with no elements if they are not requested.

depthwise_backward: from the gradient at ``h2 = act(affine(y))`` to the gradient at ``u = affine(x)`` and at the weight.
    With y: ``u2 = y_affine(y)``, ``dh2 = grad + pool_grad / (H' * W')`` (either may be None), ``du2 = dh2 * act'(u2)``,
    and dy follows from du2, y and y_coefficients. Without y: ``dy = grad``, and pool_grad, y_affine and y_coefficients are None.
    Then ``dh`` is the data gradient of the convolution at dy, and ``du = dh * act'(u)``, with u = x if affine is None.
    grad_x is ``du + residual_grad`` (residual_grad only without moments), dtype of x; grad_weight (C, 1, k, k), accumulation
    dtype; coefficients (6, C) of the normalization whose moments are given, with no elements without moments. A gradient that is
    not requested has no elements. stride and same_padding are those of the convolution. Deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import reference
from biasloss_ext.ops.registry import declare


def output_size(size: int, stride: int) -> int:
    """ceil(size / stride)"""
    return (size + stride - 1) // stride


@declare(
    reference.depthwise,
    "(Tensor x, Tensor weight, *, Tensor? affine=None, int activation=0, int stride=1, bool same_padding=False, "
    f"bool want_statistics=False, {maps.NORM}) -> (Tensor y, Tensor statistics)",
    native=("cpu", "cuda"),
)
def forward(
    x: Tensor, weight: Tensor, *, stride: int = 1, want_statistics: bool = False, **_: Any
) -> tuple[Tensor, Tensor]:
    y = maps.empty_map(x, x.shape[1], output_size(x.shape[2], stride), output_size(x.shape[3], stride))
    return y, maps.none_like(x).new_empty(4, x.shape[1]) if want_statistics else maps.none_like(x)


@declare(
    reference.depthwise_backward,
    "(Tensor x, Tensor weight, *, Tensor? grad=None, Tensor? pool_grad=None, Tensor? y=None, Tensor? y_affine=None, "
    "Tensor? y_coefficients=None, int y_activation=0, Tensor? affine=None, Tensor? moments=None, int activation=0, "
    "int stride=1, bool same_padding=False, Tensor? residual_grad=None, bool want_x=True, bool want_weight=True, "
    f"{maps.BACK}) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor coefficients)",
    native=("cpu", "cuda"),
)
def backward(
    x: Tensor,
    weight: Tensor,
    *,
    moments: Tensor | None = None,
    want_x: bool = True,
    want_weight: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    none = maps.none_like(x)
    grad_x = maps.empty_map(x, *x.shape[1:]) if want_x else x.new_empty(0)
    grad_weight = none.new_empty(weight.shape if want_weight else 0)
    return grad_x, grad_weight, none if moments is None else none.new_empty(6, x.shape[1])
