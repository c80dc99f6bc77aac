"""``biasloss_ext::squeeze_excite`` and its backward: schemas and shape functions.

squeeze_excite (Hu et al., "Squeeze-and-Excitation Networks", 2018): ``gate = gate_act(expand(act(reduce(pooled))))``.
    pooled (N, C); reduce_weight (R, C), reduce_bias (R,), expand_weight (C, R), expand_bias (C,): all in the accumulation
    dtype, contiguous. Returns gate (N, C), and what the activations were given: reduced (N, R), expanded (N, C).

squeeze_excite_backward: gradients of pooled and of the four parameters, in this order. Deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops.dispatch import Op
from biasloss_ext.ops.squeeze_excite import reference

SIGNATURE = (
    "(Tensor pooled, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, int activation, "
    "int gate_activation) -> (Tensor gate, Tensor reduced, Tensor expanded)"
)
SIGNATURE_OF_BACKWARD = (
    "(Tensor gate_grad, Tensor pooled, Tensor reduced, Tensor expanded, Tensor reduce_weight, Tensor expand_weight, "
    "int activation, int gate_activation) -> (Tensor pool_grad, Tensor reduce_weight_grad, Tensor reduce_bias_grad, "
    "Tensor expand_weight_grad, Tensor expand_bias_grad)"
)


def _fake(pooled: Tensor, reduce_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduced = pooled.new_empty(pooled.shape[0], reduce_weight.shape[0])
    return torch.empty_like(pooled), reduced, torch.empty_like(pooled)


def _fake_backward(
    gate_grad: Tensor,
    pooled: Tensor,
    reduced: Tensor,
    expanded: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(pooled),
        torch.empty_like(reduce_weight),
        pooled.new_empty(reduce_weight.shape[0]),
        torch.empty_like(expand_weight),
        pooled.new_empty(pooled.shape[1]),
    )


forward = Op("squeeze_excite", "squeeze_excite", SIGNATURE, _fake, reference.squeeze_excite)
backward = Op(
    "squeeze_excite",
    "squeeze_excite_backward",
    SIGNATURE_OF_BACKWARD,
    _fake_backward,
    reference.squeeze_excite_backward,
)
