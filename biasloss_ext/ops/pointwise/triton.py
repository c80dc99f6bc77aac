"""``biasloss_ext::pointwise_triton`` and its backward: the launches.

Forward one, and one for the moments. Backward two, gradient at the input and at the weight, and up to three that add up what
their programs leave. Deterministic, capturable in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.feature_variance.triton import WARPS, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.maps import channels_last, empty_map, none_like
from biasloss_ext.ops.pointwise import triton_backward_kernels as backward_kernels
from biasloss_ext.ops.pointwise import triton_kernels as kernels

FORWARD_STEP, DATA_STEP = 32, 64  # most channels of a step through the inner dimension; halved in float32
ANOTHER_READ = 32  # what a further block of results costs: in channels, for the factor that it reads once more
WEIGHT_BLOCK = 4096  # elements of a block of the weight's gradient that four warps keep in registers
WEIGHT_ROWS = 64  # positions that a step of the weight gradient takes
PARTIAL_SHARE = 4  # partial weight gradients are at most this part of the bytes that the kernel reads


class Tiles(NamedTuple):
    """Of a product that a kernel computes: rows x results, the inner dimension in steps of ``inner``."""

    rows: int
    results: int
    inner: int
    whole: bool  # one step takes all of the inner dimension
    warps: int
    stages: int


def tiles_of(x: Tensor, results: int, inner: int, deepest: int) -> Tiles:
    """Padding to powers of two is dear where channels are 24, 40, 72, 120 or 184: blocks that waste the least. What bounds
    them is registers: the float32 product keeps each factor in two parts, constants of a channel are kept for every column."""
    if x.dtype == torch.float64:
        return Tiles(16, 16, 16, inner <= 16, WARPS, 1)
    wide = x.dtype == torch.float32
    width = shared.block_of(results, (16, 32, 64), ANOTHER_READ)
    steps = tuple(step for step in (16, 32, 64) if step <= (deepest // 2 if wide else deepest))
    depth = shared.block_of(inner, steps, 8)
    return Tiles(32 if wide else 64, width, depth, inner <= depth, 2 * WARPS if width == 64 else WARPS, 2)


def pointwise(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    activation: int,
    gate: Tensor | None,
    bias: Tensor | None,
    output_activation: int,
    residual: Tensor | None,
    want_moments: bool,
) -> tuple[Tensor, Tensor]:
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    of_x, of_y = shared.rows_of(x), shared.rows_of(x, weight.shape[0])
    y = empty_map(x, of_y.channels, *x.shape[2:])
    moments = shared.accumulators(x, 2, of_y.channels) if want_moments else none_like(x)
    if y.numel() == 0:
        return y, moments.zero_()
    tiles = tiles_of(x, of_y.channels, of_x.channels, FORWARD_STEP)
    blocks = triton.cdiv(of_y.channels, tiles.results)
    groups = shared.groups_of(of_x.rows, tiles.rows, blocks)
    partials = shared.partial_moments(x, groups.number, of_y.channels) if want_moments else None
    with torch.cuda.device_of(x):
        kernels.forward_kernel[(blocks * groups.number,)](
            x,
            weight.contiguous(),
            shared.in_order(affine),
            shared.in_order(gate),
            shared.in_order(bias),
            residual,
            y,
            partials,
            of_x.rows,
            of_x.positions,
            of_x.units,
            of_y.units,
            blocks,
            groups.number,
            groups.tiles,
            ACTIVATION=activation,
            OUTPUT_ACTIVATION=output_activation,
            ROWS=tiles.rows,
            IN=tiles.inner,
            OUT=tiles.results,
            WHOLE=tiles.whole,
            **_meta(x, of_x, of_y),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if partials is not None:
            shared.merge_moments(partials, moments[0], moments[1], groups.number, of_y.channels, unbiased=False)
    return y, moments


def _meta(x: Tensor, of_x: shared.Rows, of_y: shared.Rows) -> dict[str, Any]:
    return {
        "IN_VECTOR": of_x.vector,
        "OUT_VECTOR": of_y.vector,
        "DTYPE": triton_dtype(accumulation_dtype(x.dtype)),
        **shared.precision_of_products(x),
    }


class _Backward(NamedTuple):
    """The arguments of `pointwise_backward` that the launches share, in the layout that kernels expect."""

    grad: Tensor
    y: Tensor | None
    coefficients: Tensor | None
    x: Tensor
    affine: Tensor | None
    activation: int
    gate: Tensor | None
    of_x: shared.Rows
    of_y: shared.Rows

    @property
    def at_y(self) -> tuple[Tensor | None, ...]:
        return self.grad, self.y, self.coefficients

    @property
    def meta(self) -> dict[str, Any]:
        return {"ACTIVATION": self.activation, **_meta(self.x, self.of_x, self.of_y)}


def pointwise_backward(
    grad: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    center: Tensor | None,
    activation: int,
    gate: Tensor | None,
    residual_grad: Tensor | None,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    behind_norm = y is not None and coefficients is not None
    given = _Backward(
        channels_last(grad),
        channels_last(y) if behind_norm and y is not None else None,
        shared.in_order(coefficients) if behind_norm else None,
        channels_last(x),
        shared.in_order(affine),
        activation,
        shared.in_order(gate),
        shared.rows_of(x),
        shared.rows_of(x, weight.shape[0]),
    )
    samples, channels = x.shape[:2]
    grad_x = empty_map(x, *x.shape[1:]) if want_x else none_like(x).to(x.dtype)
    grad_weight = shared.accumulators(x, *weight.shape) if want_weight else none_like(x)
    gate_grad = none_like(x) if gate is None else shared.accumulators(x, samples, channels)
    sums = none_like(x) if center is None else shared.accumulators(x, 4, samples, channels)
    if grad.numel() == 0 or x.numel() == 0:
        return grad_x.zero_(), grad_weight.zero_(), gate_grad.zero_(), sums.zero_()
    with torch.cuda.device_of(x):
        if want_x or gate is not None or center is not None:
            residual_grad = None if residual_grad is None else channels_last(residual_grad)
            _data_gradient(given, weight.contiguous(), center, residual_grad, grad_x, gate_grad, sums)
        if want_weight:
            _weight_gradient(given, grad_weight)
    return grad_x, grad_weight, gate_grad, sums


def _data_gradient(
    given: _Backward,
    weight: Tensor,
    center: Tensor | None,
    residual_grad: Tensor | None,
    grad_x: Tensor,
    gate_grad: Tensor,
    sums: Tensor,
) -> None:
    """Fills grad_x, gate_grad and sums, as far as they have elements."""
    x, of_x, of_y = given.x, given.of_x, given.of_y
    tiles = tiles_of(x, of_x.channels, of_y.channels, DATA_STEP)
    blocks = triton.cdiv(of_x.channels, tiles.results)
    by_sample = given.gate is not None or center is not None
    segments, segment_rows = (x.shape[0], of_x.positions) if by_sample else (1, of_x.rows)
    chunks = shared.groups_of(segment_rows, tiles.rows, blocks * segments)
    partial_gate_grad, partial_sums = gate_grad, sums
    if chunks.number > 1:
        partial_gate_grad = shared.accumulators(x, gate_grad.numel() * chunks.number)
        partial_sums = shared.accumulators(x, sums.numel() * chunks.number)
    backward_kernels.data_kernel[(blocks * chunks.number * segments,)](
        *given.at_y,
        x,
        weight,
        given.affine,
        shared.in_order(center),
        given.gate,
        residual_grad,
        grad_x if grad_x.numel() else None,
        partial_gate_grad if gate_grad.numel() else None,
        partial_sums if sums.numel() else None,
        segments,
        segment_rows,
        of_x.units,
        of_y.units,
        blocks,
        chunks.number,
        chunks.tiles * tiles.rows,
        ROWS=tiles.rows,
        IN=tiles.results,
        OUT=tiles.inner,
        WHOLE=tiles.whole,
        **given.meta,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if chunks.number > 1:
        if gate_grad.numel():
            shared.sum_partials(partial_gate_grad, gate_grad, segments, chunks.number, of_x.channels)
        if sums.numel():
            shared.sum_partials(partial_sums, sums, 4 * segments, chunks.number, of_x.channels)


class WeightTiles(NamedTuple):
    """Blocks of the weight, and rows a step."""

    rows: int
    outputs: int
    inputs: int
    warps: int


def weight_tiles_of(x: Tensor, outputs: int, inputs: int) -> WeightTiles:
    if x.dtype == torch.float64:
        return WeightTiles(16, 16, 16, WARPS)
    widest = 64 if x.dtype == torch.float32 else 128
    widths = tuple(width for width in (16, 32, 64, 128) if width <= widest)
    high, wide = (shared.block_of(channels, widths, ANOTHER_READ) for channels in (outputs, inputs))
    if high == wide == widest:
        high = widest // 2
    rows = WEIGHT_ROWS // 2 if x.dtype == torch.float32 else WEIGHT_ROWS
    return WeightTiles(rows, high, wide, WARPS if high * wide <= WEIGHT_BLOCK else 2 * WARPS)


def _weight_gradient(given: _Backward, grad_weight: Tensor) -> None:
    x, of_x, of_y = given.x, given.of_x, given.of_y
    tiles = weight_tiles_of(x, of_y.channels, of_x.channels)
    in_blocks, out_blocks = triton.cdiv(of_x.channels, tiles.inputs), triton.cdiv(of_y.channels, tiles.outputs)
    read = (of_x.channels + of_y.channels * (1 if given.y is None else 2)) * of_x.rows * x.element_size()
    most = max(read // (PARTIAL_SHARE * grad_weight.numel() * grad_weight.element_size()), 1)
    all_tiles = triton.cdiv(of_x.rows, tiles.rows)
    groups = shared.groups_of(of_x.rows, tiles.rows, in_blocks * out_blocks, longest=all_tiles)
    if groups.number > most:
        per_group = triton.cdiv(all_tiles, most)
        groups = shared.Groups(triton.cdiv(all_tiles, per_group), per_group)
    partials = grad_weight if groups.number == 1 else shared.accumulators(x, groups.number * grad_weight.numel())
    backward_kernels.weight_kernel[(in_blocks * out_blocks * groups.number,)](
        *given.at_y,
        x,
        given.affine,
        given.gate,
        partials,
        of_x.rows,
        of_x.positions,
        of_x.units,
        of_y.units,
        in_blocks,
        out_blocks,
        groups.tiles * tiles.rows,
        ROWS=tiles.rows,
        IN=tiles.inputs,
        OUT=tiles.outputs,
        **given.meta,
        num_warps=tiles.warps,
        num_stages=2,
    )
    if groups.number > 1:
        shared.sum_partials(partials, grad_weight, 1, groups.number, grad_weight.numel())
