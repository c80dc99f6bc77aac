"""The gate in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps


def squeeze_excite(
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: int,
    gate_activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    reduced = F.linear(pooled, reduce_weight, reduce_bias)
    expanded = F.linear(maps.activate(reduced, activation), expand_weight, expand_bias)
    return maps.activate(expanded, gate_activation), reduced, expanded


def squeeze_excite_backward(
    gate_grad: Tensor,
    pooled: Tensor,
    reduced: Tensor,
    expanded: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    activation: int,
    gate_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_expanded = gate_grad * maps.derivative(expanded, gate_activation)
    d_reduced = d_expanded @ expand_weight * maps.derivative(reduced, activation)
    hidden = maps.activate(reduced, activation)
    return (
        d_reduced @ reduce_weight,
        d_reduced.T @ pooled,
        d_reduced.sum(0),
        d_expanded.T @ hidden,
        d_expanded.sum(0),
    )
