"""``biasloss_ext::squeeze_excite_triton`` and its backward: one launch forward, two backward.

The batch times a few hundred channels is little work, and launches are most of its time. The first layer is shared by many
programs; the last of them to finish for some samples computes the second layer of these. Deterministic, capturable in a CUDA
graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.feature_variance.triton import WARPS, triton_dtype
from biasloss_ext.ops.squeeze_excite import triton_kernels as kernels
from biasloss_ext.ops.triton_launch import Launch, divide_up, on_its_device, tickets

BLOCK = 32  # channels of a block of results and of a step; halved in float64
SAMPLES = 16  # of a block of results, and of a step of the sums over samples


class Plan(NamedTuple):
    """The launches for values of one shape."""

    first: Launch
    second: Launch | None
    tickets: int


_plans: dict[tuple[Any, ...], Plan] = {}


def _block(values: Tensor) -> int:
    return BLOCK // 2 if values.dtype == torch.float64 else BLOCK


def _constants(values: Tensor) -> dict[str, Any]:
    return {
        "ROWS": SAMPLES,
        "BLOCK": _block(values),
        "DTYPE": triton_dtype(values.dtype),
        "PRECISION": shared.precision_of_products(values)["PRECISION"],
        "num_warps": WARPS,
        "num_stages": 2,
    }


def _layer_launch(kernel: Any, pooled: Tensor, hidden: int, activation: int, gate_activation: int) -> Launch:
    """Of a kernel whose programs take a block of hidden units of some samples."""
    samples, channels = pooled.shape
    hidden_blocks = divide_up(hidden, _block(pooled))
    return Launch(
        kernel,
        hidden_blocks * divide_up(samples, SAMPLES),
        (samples, channels, hidden, hidden_blocks),
        {"ACTIVATION": activation, "GATE_ACTIVATION": gate_activation, **_constants(pooled)},
    )


@on_its_device
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
    samples, channels = pooled.shape
    hidden, dtype, device = reduce_weight.shape[0], pooled.dtype, pooled.device
    reduced = torch.empty((samples, hidden), dtype=dtype, device=device)
    expanded, gate = (torch.empty((samples, channels), dtype=dtype, device=device) for _ in range(2))
    if pooled.numel() == 0:
        return gate, reduced, expanded
    key = (samples, channels, hidden, dtype, device, activation, gate_activation, shared.precision_setting(pooled))
    plan = _plans.get(key)
    if plan is None:
        launch = _layer_launch(kernels.gate_kernel, pooled, hidden, activation, gate_activation)
        plan = _plans[key] = Plan(launch, None, divide_up(samples, SAMPLES))
    parameters = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    plan.first(
        pooled.contiguous(),
        *[parameter.contiguous() for parameter in parameters],
        reduced,
        expanded,
        gate,
        tickets(pooled, plan.tickets),
    )
    return gate, reduced, expanded


def _backward_plan(
    pooled: Tensor, hidden: int, activations: tuple[int, int], has_sums: bool, positions: int, eps: float, frozen: bool
) -> Plan:
    samples, channels = pooled.shape
    block = _block(pooled)
    channel_blocks = divide_up(channels, block)
    weight_blocks = channel_blocks * divide_up(hidden, block)
    second = Launch(
        kernels.parameters_kernel,
        2 * weight_blocks + (channel_blocks if has_sums else 0),
        (eps, samples, channels, hidden, positions, weight_blocks),
        {
            "ACTIVATION": activations[0],
            "GATE_ACTIVATION": activations[1],
            "FROZEN": frozen,
            **_constants(pooled),
        },
    )
    first = _layer_launch(kernels.pool_gradient_kernel, pooled, hidden, *activations)
    return Plan(first, second, divide_up(samples, SAMPLES))


@on_its_device
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
    eps: float = 1e-5,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    samples, channels = pooled.shape
    hidden, dtype, device = reduce_weight.shape[0], pooled.dtype, pooled.device
    if pooled.numel() == 0:
        return _of_nothing(pooled, hidden, sums, affine, moments, eps, frozen)
    activations = activation, gate_activation
    setting = shared.precision_setting(pooled)
    key = (samples, channels, hidden, dtype, device, activations, sums is None, positions, eps, frozen, setting)
    plan = _plans.get(key)
    if plan is None:
        plan = _backward_plan(pooled, hidden, activations, sums is not None, positions, eps, frozen)
        _plans[key] = plan
    assert plan.second is not None
    gate_grad, pooled, reduced, expanded = (t.contiguous() for t in (gate_grad, pooled, reduced, expanded))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden_grad, pool_grad = empty(samples, hidden), empty(samples, channels)
    plan.first(
        gate_grad,
        expanded,
        reduced,
        reduce_weight.contiguous(),
        expand_weight.contiguous(),
        hidden_grad,
        pool_grad,
        tickets(pooled, plan.tickets),
    )
    of_parameters = empty(hidden, channels), empty(hidden), empty(channels, hidden), empty(channels)
    coefficients = empty(0) if sums is None else empty(6, channels)
    plan.second(
        gate_grad,
        pooled,
        reduced,
        expanded,
        hidden_grad,
        *of_parameters,
        shared.in_order(sums),
        pool_grad,
        shared.in_order(affine),
        shared.in_order(moments),
        coefficients,
    )
    return pool_grad, *of_parameters, coefficients


def _of_nothing(
    pooled: Tensor,
    hidden: int,
    sums: Tensor | None,
    affine: Tensor | None,
    moments: Tensor | None,
    eps: float,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For a batch without samples."""
    channels = pooled.shape[1]
    coefficients = pooled.new_empty(0)
    if sums is not None and affine is not None and moments is not None:
        coefficients = maps.finish_coefficients(torch.zeros_like(moments), affine, moments, 0, eps=eps, frozen=frozen)
    return (
        torch.empty_like(pooled),
        pooled.new_zeros(hidden, channels),
        pooled.new_zeros(hidden),
        pooled.new_zeros(channels, hidden),
        pooled.new_zeros(channels),
        coefficients,
    )
