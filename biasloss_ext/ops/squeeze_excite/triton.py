"""``biasloss_ext::squeeze_excite_triton`` and its backward: one launch forward, two backward.

The batch times a few hundred channels is little work, and launches are most of its time. A program takes some hidden units of
some samples through both layers; the last one of the samples adds up what the hidden units contribute to the second layer.
Deterministic, capturable in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.feature_variance.triton import BYTES_PER_LOAD, WARPS, triton_dtype
from biasloss_ext.ops.library import with_arguments_of
from biasloss_ext.ops.replay import empty
from biasloss_ext.ops.squeeze_excite import op
from biasloss_ext.ops.squeeze_excite import triton_kernels as kernels
from biasloss_ext.ops.squeeze_excite.reference import Arguments, BackwardArguments
from biasloss_ext.ops.triton_launch import Launch, divide_up, tickets

SAMPLES = 16  # of a block of results: the fewest rows of a product
CHANNELS = 64  # of a step through the channels
HIDDEN = 32  # units of a program
BLOCK = 32  # channels of a block of a weight's gradient
OF_FLOAT64 = 16  # in place of all of these
PARTS_AT_ONCE = 4  # of the second layer's results, that the last program of some samples loads at a time


class Plan(NamedTuple):
    """The launches for values of one shape."""

    layers: Launch
    parameters: Launch | None
    partials: int
    tickets: int


_plans: dict[tuple[Any, ...], Plan] = {}


def _size(values: Tensor, size: int) -> int:
    return min(size, OF_FLOAT64) if values.dtype == torch.float64 else size


def _options(values: Tensor) -> dict[str, Any]:
    return {
        "DTYPE": triton_dtype(values.dtype),
        "PRECISION": shared.precision_of_products(values)["PRECISION"],
        "num_warps": WARPS,
        "num_stages": 2,
    }


def _layers_plan(
    pooled: Tensor, hidden: int, activations: tuple[int, int], backward: bool, parameters: Launch | None
) -> Plan:
    samples, channels = pooled.shape
    activation, gate_activation = (maps.checked_activation(number) for number in activations)
    widest = BYTES_PER_LOAD // pooled.element_size()
    channel_vector, hidden_vector = math.gcd(widest, channels), math.gcd(widest, hidden)
    hidden_block = _size(pooled, HIDDEN)
    hidden_blocks, row_blocks = max(divide_up(hidden, hidden_block), 1), divide_up(samples, SAMPLES)
    launch = Launch(
        kernels.layers_kernel,
        hidden_blocks * row_blocks,
        (samples, channels // channel_vector, hidden // hidden_vector, hidden_blocks),
        {
            "ACTIVATION": activation,
            "GATE_ACTIVATION": gate_activation,
            "BACKWARD": backward,
            "CHANNEL_VECTOR": channel_vector,
            "HIDDEN_VECTOR": hidden_vector,
            "ROWS": SAMPLES,
            "CHANNELS": _size(pooled, CHANNELS),
            "HIDDEN": hidden_block,
            "AT_ONCE": PARTS_AT_ONCE,
            **_options(pooled),
        },
    )
    return Plan(launch, parameters, hidden_blocks * samples * channels if hidden_blocks > 1 else 0, row_blocks)


def _parameters_launch(call: BackwardArguments) -> Launch:
    pooled, hidden = call.pooled, call.reduce_weight.shape[0]
    samples, channels = pooled.shape
    block = _size(pooled, BLOCK)
    channel_blocks = divide_up(channels, block)
    weight_blocks = channel_blocks * divide_up(hidden, block)
    return Launch(
        kernels.parameters_kernel,
        2 * weight_blocks + (channel_blocks if call.sums is not None else 0),
        (call.eps, samples, channels, hidden, call.positions, weight_blocks),
        {
            "ACTIVATION": call.activation,
            "GATE_ACTIVATION": call.gate_activation,
            "FROZEN": call.frozen,
            "ROWS": SAMPLES,
            "BLOCK": block,
            **_options(pooled),
        },
    )


@with_arguments_of(Arguments)
def squeeze_excite(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    pooled, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate_activation = call
    samples, channels = pooled.shape
    hidden, dtype, device = reduce_weight.shape[0], pooled.dtype, pooled.device
    reduced = empty((samples, hidden), dtype, device)
    expanded, gate = (empty((samples, channels), dtype, device) for _ in range(2))
    if pooled.numel() == 0:
        return gate, reduced, expanded
    key = (samples, channels, hidden, dtype, device, activation, gate_activation, shared.precision_setting(pooled))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _layers_plan(pooled, hidden, (activation, gate_activation), False, None)
    plan.layers(
        shared.in_order(pooled),
        None,
        shared.in_order(reduce_weight),
        shared.in_order(reduce_bias),
        None,
        reduced,
        shared.in_order(expand_weight),
        shared.in_order(expand_bias),
        expanded,
        gate,
        empty(plan.partials, dtype, device) if plan.partials else None,
        tickets(pooled, plan.tickets) if plan.partials else None,
    )
    return gate, reduced, expanded


@with_arguments_of(BackwardArguments)
def squeeze_excite_backward(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pooled, sums = call.pooled, call.sums
    samples, channels = pooled.shape
    hidden, dtype, device = call.reduce_weight.shape[0], pooled.dtype, pooled.device
    if pooled.numel() == 0:
        return _of_nothing(call)
    activations = call.activation, call.gate_activation
    numbers = activations, call.positions, call.eps, call.frozen
    key = (samples, channels, hidden, dtype, device, sums is None, numbers, shared.precision_setting(pooled))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _layers_plan(pooled, hidden, activations, True, _parameters_launch(call))
    assert plan.parameters is not None
    gate_grad, pooled, reduced, expanded = (
        t.contiguous() for t in (call.gate_grad, pooled, call.reduced, call.expanded)
    )

    def values(*shape: int) -> Tensor:
        return empty(shape, dtype, device)

    hidden_grad, pool_grad = values(samples, hidden), values(samples, channels)
    plan.layers(
        gate_grad,
        expanded,
        shared.in_order(call.expand_weight),
        None,
        reduced,
        hidden_grad,
        shared.in_order(call.reduce_weight),
        None,
        pool_grad,
        None,
        values(plan.partials) if plan.partials else None,
        tickets(pooled, plan.tickets) if plan.partials else None,
    )
    of_parameters = values(hidden, channels), values(hidden), values(channels, hidden), values(channels)
    coefficients = values(0) if sums is None else values(6, channels)
    plan.parameters(
        gate_grad,
        pooled,
        reduced,
        expanded,
        hidden_grad,
        *of_parameters,
        shared.in_order(sums),
        pool_grad,
        shared.in_order(call.affine),
        shared.in_order(call.moments),
        coefficients,
    )
    return pool_grad, *of_parameters, coefficients


def _of_nothing(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For a batch without samples."""
    *gradients, coefficients = op.backward.fake(call.gate_grad, call.pooled, call.reduced, sums=call.sums)
    pool_grad, *of_parameters = [gradient.zero_() for gradient in gradients]
    if call.sums is not None:
        assert call.affine is not None and call.moments is not None
        zeros = torch.zeros_like(call.moments)
        coefficients = maps.finish_coefficients(zeros, call.affine, call.moments, 0, eps=call.eps, frozen=call.frozen)
    return pool_grad, *of_parameters, coefficients
