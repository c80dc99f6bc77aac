"""``biasloss_ext::squeeze_excite_triton`` and its backward: the launches, two forward and four backward.

The batch times a few hundred channels is little work: what counts is that many programs share it. Deterministic, capturable in
a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.feature_variance.triton import WARPS, triton_dtype
from biasloss_ext.ops.squeeze_excite import triton_kernels as kernels

BLOCK = 32  # channels of a block of results and of a step; halved in float64
SAMPLES = 16  # of a block of results, and of a step of the sums over samples


def _meta(values: Tensor) -> dict[str, object]:
    return {
        "ROWS": SAMPLES,
        "IN": _block(values),
        "OUT": _block(values),
        "DTYPE": triton_dtype(values.dtype),
        "PRECISION": shared.precision_of_products(values)["PRECISION"],
        "num_warps": WARPS,
        "num_stages": 2,
    }


def _block(values: Tensor) -> int:
    return BLOCK // 2 if values.dtype == torch.float64 else BLOCK


def _linear(
    values: Tensor,
    slope_at: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    output_activation: int = maps.IDENTITY,
    activated: Tensor | None = None,
) -> Tensor:
    """(N, in) @ weight (out, in) transposed; what is done to the values before and after: `kernels.linear_kernel`."""
    samples, in_channels = values.shape
    out_channels = weight.shape[0]
    result = values.new_empty(samples, out_channels)
    blocks = triton.cdiv(out_channels, _block(values))
    kernels.linear_kernel[(blocks * triton.cdiv(samples, SAMPLES),)](
        values,
        slope_at,
        weight,
        bias,
        result,
        activated,
        samples,
        in_channels,
        out_channels,
        blocks,
        weight.stride(1),
        weight.stride(0),
        ACTIVATION=activation,
        OUTPUT_ACTIVATION=output_activation,
        **_meta(values),
    )
    return result


def _weight_gradient(
    grad: Tensor,
    slope_at: Tensor,
    values: Tensor,
    slope_activation: int,
    activation: int = maps.IDENTITY,
) -> tuple[Tensor, Tensor]:
    """Of weight (out, in) and bias: grad * act'(slope_at) is (N, out), act(values) is (N, in)."""
    samples, out_channels = grad.shape
    in_channels = values.shape[1]
    weight_grad, bias_grad = grad.new_empty(out_channels, in_channels), grad.new_empty(out_channels)
    in_blocks = triton.cdiv(in_channels, _block(grad))
    kernels.weight_kernel[(in_blocks * triton.cdiv(out_channels, _block(grad)),)](
        grad,
        slope_at,
        values,
        weight_grad,
        bias_grad,
        samples,
        in_channels,
        out_channels,
        in_blocks,
        GATE_ACTIVATION=slope_activation,
        ACTIVATION=activation,
        **_meta(grad),
    )
    return weight_grad, bias_grad


def squeeze_excite(
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    activation: int,
    gate_activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pooled = pooled.contiguous()
    gate = torch.empty_like(pooled)
    if pooled.numel() == 0:
        return gate, pooled.new_empty(pooled.shape[0], reduce_weight.shape[0]), torch.empty_like(pooled)
    with torch.cuda.device_of(pooled):
        reduced = _linear(pooled, None, reduce_weight, reduce_bias.contiguous(), maps.IDENTITY)
        expanded = _linear(reduced, None, expand_weight, expand_bias.contiguous(), activation, gate_activation, gate)
    return gate, reduced, expanded


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
    gate_grad, pooled, reduced, expanded = (t.contiguous() for t in (gate_grad, pooled, reduced, expanded))
    if pooled.numel() == 0:
        return (
            torch.empty_like(pooled),
            torch.zeros_like(reduce_weight),
            pooled.new_zeros(reduce_weight.shape[0]),
            torch.zeros_like(expand_weight),
            pooled.new_zeros(pooled.shape[1]),
        )
    with torch.cuda.device_of(pooled):
        hidden_grad = _linear(gate_grad, expanded, expand_weight.t(), None, gate_activation)
        pool_grad = _linear(hidden_grad, reduced, reduce_weight.t(), None, activation)
        reduce_weight_grad, reduce_bias_grad = _weight_gradient(hidden_grad, reduced, pooled, activation)
        expand_weight_grad, expand_bias_grad = _weight_gradient(
            gate_grad, expanded, reduced, gate_activation, activation
        )
    return pool_grad, reduce_weight_grad, reduce_bias_grad, expand_weight_grad, expand_bias_grad
