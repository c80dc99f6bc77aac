"""``biasloss_ext::squeeze_excite`` and its backward: declarations.

squeeze_excite (Hu et al., "Squeeze-and-Excitation Networks", 2018): ``gate = gate_act(expand(act(reduce(pooled))))``.
    pooled (N, C); reduce_weight (R, C), reduce_bias (R,), expand_weight (C, R), expand_bias (C,): all in the accumulation
    dtype, contiguous. Returns gate (N, C) and the inputs of the activations: reduced (N, R), expanded (N, C).

squeeze_excite_backward: gradients of pooled and of the four parameters, in this order. From the sums (4, N, C) of
    `pointwise_backward` over the ``positions`` of each sample, it also finishes the coefficients (6, C) of the normalization
    before the pool, with its affine and moments. They have no elements without sums. Deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.registry import declare
from biasloss_ext.ops.squeeze_excite import reference


@declare(
    reference.squeeze_excite,
    "(Tensor pooled, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, *, "
    "int activation=0, int gate_activation=0) -> (Tensor gate, Tensor reduced, Tensor expanded)",
    triton=True,
)
def forward(pooled: Tensor, reduce_weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduced = pooled.new_empty(pooled.shape[0], reduce_weight.shape[0])
    return torch.empty_like(pooled), reduced, torch.empty_like(pooled)


@declare(
    reference.squeeze_excite_backward,
    "(Tensor gate_grad, Tensor pooled, Tensor reduced, Tensor expanded, Tensor reduce_weight, Tensor expand_weight, *, "
    "int activation=0, int gate_activation=0, Tensor? sums=None, Tensor? affine=None, Tensor? moments=None, "
    f"SymInt positions=1, {maps.BACK}) -> (Tensor pool_grad, Tensor reduce_weight_grad, Tensor reduce_bias_grad, "
    "Tensor expand_weight_grad, Tensor expand_bias_grad, Tensor coefficients)",
    triton=True,
)
def backward(
    gate_grad: Tensor, pooled: Tensor, reduced: Tensor, *_: Any, sums: Tensor | None = None, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, channels = reduced.shape[1], pooled.shape[1]
    return (
        torch.empty_like(pooled),
        pooled.new_empty(hidden, channels),
        pooled.new_empty(hidden),
        pooled.new_empty(channels, hidden),
        pooled.new_empty(channels),
        pooled.new_empty(0) if sums is None else pooled.new_empty(6, channels),
    )
