"""The gate in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.library import with_arguments_of


class Arguments(NamedTuple):
    """Of ``biasloss_ext::squeeze_excite``."""

    pooled: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    activation: int = 0
    gate_activation: int = 0


class BackwardArguments(NamedTuple):
    """Of ``biasloss_ext::squeeze_excite_backward``."""

    gate_grad: Tensor
    pooled: Tensor
    reduced: Tensor
    expanded: Tensor
    reduce_weight: Tensor
    expand_weight: Tensor
    activation: int = 0
    gate_activation: int = 0
    sums: Tensor | None = None
    affine: Tensor | None = None
    moments: Tensor | None = None
    positions: int = 1
    eps: float = 1e-5
    frozen: bool = False


@with_arguments_of(Arguments)
def squeeze_excite(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    reduced = F.linear(call.pooled, call.reduce_weight, call.reduce_bias)
    expanded = F.linear(maps.activate(reduced, call.activation), call.expand_weight, call.expand_bias)
    gate = maps.activate(expanded, call.gate_activation)
    return gate.clone() if gate is expanded else gate, reduced, expanded


@with_arguments_of(BackwardArguments)
def squeeze_excite_backward(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pooled, reduced, sums = call.pooled, call.reduced, call.sums
    d_expanded = call.gate_grad * maps.derivative(call.expanded, call.gate_activation)
    d_reduced = d_expanded @ call.expand_weight * maps.derivative(reduced, call.activation)
    hidden = maps.activate(reduced, call.activation)
    pool_grad = d_reduced @ call.reduce_weight
    coefficients = pooled.new_empty(0)
    if sums is not None:
        assert call.affine is not None and call.moments is not None
        shared = pool_grad / call.positions
        over_samples = torch.stack(((sums[0] + shared * sums[1]).sum(0), (sums[2] + shared * sums[3]).sum(0)))
        count = pooled.shape[0] * call.positions
        coefficients = maps.finish_coefficients(
            over_samples, call.affine, call.moments, count, eps=call.eps, frozen=call.frozen
        )
    return (
        pool_grad,
        d_reduced.T @ pooled,
        d_reduced.sum(0),
        d_expanded.T @ hidden,
        d_expanded.sum(0),
        coefficients,
    )
