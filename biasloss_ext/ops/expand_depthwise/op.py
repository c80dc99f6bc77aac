"""``biasloss_ext::expand_depthwise``, its variant for constant statistics, its backward, and ``biasloss_ext::channel_gram``:
declarations.

`biasloss_ext.ops.maps` defines affine, moments, statistics and coefficients.

channel_gram: mean (C,) of x over N, H and W, and ``gram = sum (x - mean)(x - mean)^T`` (C, C), accumulation dtype. They give the
    moments of the expanded map ``y1 = x @ W^T`` without computing it: the mean is ``W mean``, the variance
    ``w_c^T gram w_c / count``.

channel_gram_product: takes weight (E, C) and weight_gram (E, C), the matrix product of weight and gram. Returns the exact
    product and the moments (2, E) of y1. If a common signal of the channels cancels in ``w_c``, the rounding of the Gram
    matrix would dominate the result. If the variance is below 1/64 of that of uncorrelated channels, moments and row are
    therefore computed from x. Deterministic, regardless of the number of threads.

expand_depthwise: ``y = depthwise(act(affine(conv(x, expand_weight))), weight)``, stride and same_padding as in depthwise.
    x (N, C, H, W) channels_last; expand_weight (E, C, 1, 1), weight (E, 1, k, k), k = 3, 5 or 7, accumulation dtype;
    affine (2, E). y (N, E, ceil(H / stride), ceil(W / stride)), dtype of x, channels_last; statistics (4, E) of y if requested.
    The expanded map is recomputed in the accumulation dtype when it is needed, and never stored.
    Constant weights may be passed in the layouts that the kernels read. This saves packing them in each call, and the results are
    bit-identical: expand_weight as a view of (C, E) memory with rows padded to multiples of 16, weight as a view of (k, k, E)
    memory. Otherwise weight is contiguous; expand_weight may have any strides and is packed. The backward op takes only
    contiguous weights.

expand_depthwise_activate: ``h = act(affine(y))`` of the same y, with y_affine (2, E) and y_activation; y is never stored or
    rounded to the dtype of x. pooled (N, E) is the mean of h over the positions of a sample, accumulation dtype, with no
    elements if it is not requested. Deterministic, regardless of the number of threads.

expand_depthwise_backward: the arguments about y as in depthwise_backward; du is the gradient at ``affine(y1)``.
    grad_x (N, C, H, W) in the accumulation dtype, channels_last: ``(scale * du) @ expand_weight``. It lacks the terms of the
    batch normalization's own statistics, which the caller adds from x; grad_expand (E, C, 1, 1):
    ``sum du (x - x_mean)^T``; grad_weight (E, 1, k, k); coefficients (6, E) of the normalization of y1. Deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise.op import output_size
from biasloss_ext.ops.expand_depthwise import reference
from biasloss_ext.ops.library import with_arguments_of
from biasloss_ext.ops.registry import declare


@declare(reference.channel_gram, "(Tensor x) -> (Tensor mean, Tensor gram)")
def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    none, channels = maps.none_like(x), x.shape[1]
    return none.new_empty(channels), none.new_empty(channels, channels)


@declare(
    reference.channel_gram_product,
    "(Tensor x, Tensor mean, Tensor gram, Tensor weight, Tensor weight_gram) -> (Tensor exact, Tensor moments)",
)
def product(x: Tensor, mean: Tensor, gram: Tensor, weight: Tensor, weight_gram: Tensor) -> tuple[Tensor, Tensor]:
    return weight_gram.new_empty(weight_gram.shape), mean.new_empty(2, weight.shape[0])


@declare(
    reference.expand_depthwise,
    "(Tensor x, Tensor expand_weight, Tensor affine, Tensor weight, *, int activation=0, int stride=1, "
    f"bool same_padding=False, bool want_statistics=False, {maps.NORM}) -> (Tensor y, Tensor statistics)",
)
def forward(
    x: Tensor,
    expand_weight: Tensor,
    affine: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    want_statistics: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    none, channels = maps.none_like(x), weight.shape[0]
    y = maps.empty_map(x, channels, output_size(x.shape[2], stride), output_size(x.shape[3], stride))
    return y, none.new_empty(4, channels) if want_statistics else none


@declare(
    reference.expand_depthwise_activate,
    "(Tensor x, Tensor expand_weight, Tensor affine, Tensor weight, Tensor y_affine, *, int activation=0, int stride=1, "
    "bool same_padding=False, int y_activation=0, bool want_pool=False) -> (Tensor h, Tensor pooled)",
)
def activate(
    x: Tensor, expand_weight: Tensor, affine: Tensor, weight: Tensor, *_: Any, want_pool: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    h, none = forward.fake(x, expand_weight, affine, weight, **options)
    return h, none.new_empty(x.shape[0], weight.shape[0]) if want_pool else none


@declare(
    reference.expand_depthwise_backward,
    "(Tensor x, Tensor x_mean, Tensor expand_weight, Tensor affine, Tensor moments, Tensor weight, Tensor y, "
    "Tensor y_affine, Tensor y_coefficients, *, Tensor? grad=None, Tensor? pool_grad=None, int y_activation=0, "
    f"int activation=0, int stride=1, bool same_padding=False, {maps.BACK}) -> "
    "(Tensor grad_x, Tensor grad_expand, Tensor grad_weight, Tensor coefficients)",
)
@with_arguments_of(reference.BackwardArguments, back=maps.Back)
def backward(call: reference.BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, none = call.x, maps.none_like(call.x)
    return (
        maps.empty_map(x, x.shape[1], x.shape[2], x.shape[3], dtype=none.dtype),
        none.new_empty(call.expand_weight.shape),
        none.new_empty(call.weight.shape),
        none.new_empty(6, call.weight.shape[0]),
    )
