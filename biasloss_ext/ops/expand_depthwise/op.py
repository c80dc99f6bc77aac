"""``biasloss_ext::expand_depthwise``, its variant for constant statistics, its backward, and ``biasloss_ext::channel_gram``:
schemas and shape functions.

The words affine, moments, coefficients, sums and center are explained in :mod:`biasloss_ext.ops.maps`.

channel_gram: mean (C,) of x over N, H, W, and ``gram = sum (x - mean)(x - mean)^T`` (C, C), accumulation dtype. The moments
    of the expanded map ``y1 = x @ W^T`` follow without computing it: mean ``W mean``, variance ``w_c^T gram w_c / count``.

expand_depthwise: ``y = depthwise(act(affine(conv(x, expand_weight))), weight)``.
    x (N, C, H, W) channels_last; expand_weight (E, C, 1, 1), weight (E, 1, k, k), k in 3, 5, 7, accumulation dtype;
    affine (2, E). y (N, E, ceil(H / stride), ceil(W / stride)), dtype of x, channels_last; moments of y as asked.
    The expanded map is recomputed in the accumulation dtype wherever it is needed, and never stored.
    Constant weights may be handed over in the layouts that the kernels read, which saves packing them at each call and changes
    no bit of the results: expand_weight as a view of (C, E) memory whose rows are padded to multiples of 16, weight as one of
    (k, k, E) memory. Else weight is contiguous; expand_weight may have any strides, and is packed. The backward op takes
    contiguous ones alone.

expand_depthwise_activate: ``h = act(affine(y))`` with y_affine (2, E) and y_activation, of the same y, which is never stored
    (nor rounded to the dtype of x), and pooled (N, E), the mean of h over a sample's positions, accumulation dtype, no elements
    where it is not wanted. Deterministic, whatever the number of threads.

expand_depthwise_backward: arguments up to y_activation as in depthwise_backward; du is the gradient at ``affine(y1)``.
    grad_x (N, C, H, W) in the accumulation dtype, channels_last: ``(scale * du) @ expand_weight``, that is, without the terms
    of the batch normalisation's own statistics, which the caller adds from x; grad_expand (E, C, 1, 1):
    ``sum du (x - x_mean)^T``; grad_weight (E, 1, k, k); sums (2, E) of du about (y1, center). Deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise.op import output_size
from biasloss_ext.ops.dispatch import Op
from biasloss_ext.ops.expand_depthwise import reference

SIGNATURE_OF_GRAM = "(Tensor x) -> (Tensor mean, Tensor gram)"
SIGNATURE = (
    "(Tensor x, Tensor expand_weight, Tensor affine, int activation, Tensor weight, int stride, bool want_moments) -> "
    "(Tensor y, Tensor moments)"
)
SIGNATURE_OF_ACTIVATE = (
    "(Tensor x, Tensor expand_weight, Tensor affine, int activation, Tensor weight, int stride, Tensor y_affine, "
    "int y_activation, bool want_pool) -> (Tensor h, Tensor pooled)"
)
SIGNATURE_OF_BACKWARD = (
    "(Tensor? grad, Tensor? pool_grad, Tensor y, Tensor y_affine, Tensor y_coefficients, int y_activation, Tensor x, "
    "Tensor x_mean, Tensor expand_weight, Tensor affine, Tensor center, int activation, Tensor weight, int stride) -> "
    "(Tensor grad_x, Tensor grad_expand, Tensor grad_weight, Tensor sums)"
)


def _fake_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    none, channels = maps.none_like(x), x.shape[1]
    return none.new_empty(channels), none.new_empty(channels, channels)


def _fake(
    x: Tensor, expand_weight: Tensor, affine: Tensor, activation: int, weight: Tensor, stride: int, want_moments: bool
) -> tuple[Tensor, Tensor]:
    none, channels = maps.none_like(x), weight.shape[0]
    y = maps.empty_map(x, channels, output_size(x.shape[2], stride), output_size(x.shape[3], stride))
    return y, none.new_empty(2, channels) if want_moments else none


def _fake_activate(
    x: Tensor,
    expand_weight: Tensor,
    affine: Tensor,
    activation: int,
    weight: Tensor,
    stride: int,
    y_affine: Tensor,
    y_activation: int,
    want_pool: bool,
) -> tuple[Tensor, Tensor]:
    h, none = _fake(x, expand_weight, affine, activation, weight, stride, False)
    return h, none.new_empty(x.shape[0], weight.shape[0]) if want_pool else none


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _, expand_weight, _, _, _, weight, _ = arguments[6:]
    none = maps.none_like(x)
    return (
        maps.empty_map(x, x.shape[1], x.shape[2], x.shape[3], dtype=none.dtype),
        none.new_empty(expand_weight.shape),
        none.new_empty(weight.shape),
        none.new_empty(2, weight.shape[0]),
    )


_FAMILY = "expand_depthwise"
gram = Op(_FAMILY, "channel_gram", SIGNATURE_OF_GRAM, _fake_gram, reference.channel_gram)
forward = Op(_FAMILY, "expand_depthwise", SIGNATURE, _fake, reference.expand_depthwise)
activate = Op(_FAMILY, "expand_depthwise_activate", SIGNATURE_OF_ACTIVATE, _fake_activate, reference.activate)
backward = Op(
    _FAMILY, "expand_depthwise_backward", SIGNATURE_OF_BACKWARD, _fake_backward, reference.expand_depthwise_backward
)
