"""The gate in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps


def squeeze_excite(
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    *,
    activation: int = 0,
    gate_activation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    reduced = F.linear(pooled, reduce_weight, reduce_bias)
    expanded = F.linear(maps.activate(reduced, activation), expand_weight, expand_bias)
    gate = maps.activate(expanded, gate_activation)
    return gate.clone() if gate is expanded else gate, reduced, expanded


def squeeze_excite_backward(
    gate_grad: Tensor,
    pooled: Tensor,
    reduced: Tensor,
    expanded: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    *,
    activation: int = 0,
    gate_activation: int = 0,
    sums: Tensor | None = None,
    affine: Tensor | None = None,
    moments: Tensor | None = None,
    positions: int = 1,
    **back: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_expanded = gate_grad * maps.derivative(expanded, gate_activation)
    d_reduced = d_expanded @ expand_weight * maps.derivative(reduced, activation)
    hidden = maps.activate(reduced, activation)
    pool_grad = d_reduced @ reduce_weight
    coefficients = pooled.new_empty(0)
    if sums is not None:
        assert affine is not None and moments is not None
        shared = pool_grad / positions
        over_samples = torch.stack(((sums[0] + shared * sums[1]).sum(0), (sums[2] + shared * sums[3]).sum(0)))
        count = pooled.shape[0] * positions
        coefficients = maps.finish_coefficients(over_samples, affine, moments, count, **back)
    return (
        pool_grad,
        d_reduced.T @ pooled,
        d_reduced.sum(0),
        d_expanded.T @ hidden,
        d_expanded.sum(0),
        coefficients,
    )
