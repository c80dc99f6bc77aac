"""``biasloss_ext::pointwise_backward_triton``: one launch, or one for the gradient at the input and one for the weight's.

The last programs of each add up what the others leave, and finish the coefficients of the normalization before the input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.feature_variance.triton import triton_dtype
from biasloss_ext.ops.library import accumulation_dtype, with_arguments_of
from biasloss_ext.ops.pointwise import triton_backward_kernels as kernels
from biasloss_ext.ops.pointwise import triton_tiles as tiling
from biasloss_ext.ops.pointwise.reference import BackwardArguments
from biasloss_ext.ops.replay import empty, empty_strided
from biasloss_ext.ops.triton_launch import Launch, divide_up, tickets


class Wanted(NamedTuple):
    """What a plan depends on besides shapes and dtypes."""

    activation: int
    behind_norm: bool
    affine: bool
    moments: bool
    gate: bool
    any_origin: bool
    x: bool
    weight: bool
    eps: float
    frozen: bool

    @property
    def data_gradient(self) -> bool:
        return self.x or self.gate or self.moments


class WeightSums(NamedTuple):
    """How the partial gradients of the weight are added up: ``sets`` of so many groups; none of it where there is one group."""

    groups: int
    groups_of_set: int
    sets: int
    elements: int  # of a partial gradient

    @property
    def partials(self) -> int:
        return self.groups * self.elements if self.groups > 1 else 0

    @property
    def partials_of_sets(self) -> int:
        return self.sets * self.elements if self.groups > 1 else 0


class Plan(NamedTuple):
    """The launches for tensors of some shapes and dtypes, and what is to be allocated for them."""

    x_shape: tuple[int, ...]
    x_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    weight_shape: tuple[int, ...]
    wide: torch.dtype
    data: Launch | None
    one_read: bool
    data_partials: int
    weight: Launch | None
    weight_partials: int
    weight_sets: int
    tickets: int


_plans: dict[tuple[Any, ...], Plan] = {}


@with_arguments_of(BackwardArguments)
def pointwise_backward(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, x, weight, y, y_coefficients, affine, moments, activation, gate, residual_grad, *wanted = call
    if y is None or y_coefficients is None:
        y = y_coefficients = None
    given = shared.dtypes_of(grad, x, weight, y, y_coefficients, affine, moments, gate, residual_grad)
    numbers = activation, *wanted
    key = (x.shape, x.device, weight.shape, weight.stride(), given, numbers, shared.precision_setting(x))
    plan = _plans.get(key)
    if plan is None:
        if x.numel() == 0:
            return _of_nothing(call)
        optional = (t is not None for t in (y, affine, moments, gate))
        plan = _plans[key] = _plan(x, weight, Wanted._make((activation, *optional, *wanted)))

    x = shared.dense(x, plan.x_strides)
    grad = shared.dense(grad, plan.y_strides)
    y = None if y is None else shared.dense(y, plan.y_strides)
    y_coefficients, affine, gate = map(shared.in_order, (y_coefficients, affine, gate))
    device, wide, none = x.device, plan.wide, (0,)
    samples, channels = plan.x_shape[:2]
    by_sample, by_channel = moments is not None and gate is not None, moments is not None and gate is None
    grad_x = (
        empty_strided(plan.x_shape, plan.x_strides, x.dtype, device) if call.want_x else empty(none, x.dtype, device)
    )
    grad_weight = empty(plan.weight_shape if call.want_weight else none, wide, device)
    gate_grad = empty(none if gate is None else (samples, channels), wide, device)
    sums = empty((4, samples, channels) if by_sample else none, wide, device)
    coefficients = empty((6, channels) if by_channel else none, wide, device)

    counters = tickets(x, plan.tickets) if plan.tickets else None
    weight_partials = weight_sets = None
    if plan.weight_partials:
        weight_partials = empty(plan.weight_partials, wide, device)
        weight_sets = empty(plan.weight_sets, wide, device)
    if plan.data is not None:
        plan.data(
            grad,
            y,
            y_coefficients,
            x,
            weight,
            affine,
            shared.in_order(moments),
            gate,
            None if residual_grad is None else shared.dense(residual_grad, plan.x_strides),
            grad_x if call.want_x else None,
            None if gate is None else gate_grad,
            sums if by_sample else None,
            coefficients if by_channel else None,
            grad_weight if plan.one_read else None,
            empty(plan.data_partials, wide, device) if plan.data_partials else None,
            weight_partials if plan.one_read else None,
            weight_sets if plan.one_read else None,
            counters,
        )
    if plan.weight is not None:
        plan.weight(grad, y, y_coefficients, x, affine, gate, grad_weight, weight_partials, weight_sets, counters)
    return grad_x, grad_weight, gate_grad, sums, coefficients


class _Shapes(NamedTuple):
    """The parts of both launches."""

    x: Tensor
    weight: Tensor
    of_x: shared.Rows
    of_y: shared.Rows
    wanted: Wanted

    @property
    def read(self) -> int:
        """Bytes of the maps that the gradient of the weight is taken from."""
        channels = self.of_x.channels + self.of_y.channels * (2 if self.wanted.behind_norm else 1)
        return channels * self.of_x.rows * self.x.element_size()

    @property
    def most_groups(self) -> int:
        """Partial gradients of the weight that are small compared with what is read."""
        size = self.weight.numel() * accumulation_dtype(self.x.dtype).itemsize
        return max(self.read // (tiling.PARTIAL_SHARE * max(size, 1)), 1)

    @property
    def constants(self) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "ACTIVATION": wanted.activation,
            "IN_VECTOR": self.of_x.vector,
            "OUT_VECTOR": self.of_y.vector,
            "ANY_ORIGIN": wanted.any_origin and not (wanted.affine or wanted.gate or wanted.activation),
            "DTYPE": triton_dtype(accumulation_dtype(self.x.dtype)),
            **shared.precision_of_products(self.x),
        }

    def weight_sums(self, groups: int) -> WeightSums:
        groups_of_set = tiling.groups_of_set(groups)
        return WeightSums(groups, groups_of_set, divide_up(groups, groups_of_set), self.weight.numel())


def _plan(x: Tensor, weight: Tensor, wanted: Wanted) -> Plan:
    shapes = _Shapes(x, weight, shared.rows_of(x), shared.rows_of(x, weight.shape[0]), wanted)
    data = weight_launch = None
    one_read, data_partials, data_tickets, weight_tickets = False, 0, 0, 0
    sums = shapes.weight_sums(1)
    if wanted.data_gradient:
        one_read, chunks, segments, tiles = _data_tiles(shapes)
        if one_read:
            sums = shapes.weight_sums(chunks.number * segments)
            weight_tickets = sums.sets + 1
        data, data_partials, data_tickets = _data_launch(shapes, tiles, chunks, segments, sums)
    if wanted.weight and not one_read:
        weight_launch, sums, weight_tickets = _weight_launch(shapes)
    return Plan(
        tuple(x.shape),
        shared.strides_of(x.shape),
        shared.strides_of((x.shape[0], weight.shape[0], *x.shape[2:])),
        tuple(weight.shape),
        accumulation_dtype(x.dtype),
        data,
        one_read,
        data_partials,
        weight_launch,
        sums.partials if wanted.weight else 0,
        sums.partials_of_sets if wanted.weight else 0,
        data_tickets + weight_tickets if one_read else max(data_tickets, weight_tickets),
    )


def _data_tiles(shapes: _Shapes) -> tuple[bool, tiling.Groups, int, tiling.Tiles]:
    """(whether one kernel takes both gradients, chunks of a segment, segments, tiles)."""
    of_x, of_y, wanted = shapes.of_x, shapes.of_y, shapes.wanted
    segments, segment_rows = (shapes.x.shape[0], of_x.positions) if wanted.gate else (1, of_x.rows)
    if wanted.weight:
        tiles = tiling.one_read_tiles(shapes.x.dtype, of_y.channels, of_x.channels, wanted.gate)
        most = shapes.most_groups // segments
        if tiles is not None and most > 0:
            return True, tiling.groups_of(segment_rows, tiles.rows, segments, most=most), segments, tiles
    tiles = tiling.data_tiles(shapes.x.dtype, of_x.channels, of_y.channels, wanted.gate)
    blocks = divide_up(of_x.channels, tiles.results)
    return False, tiling.groups_of(segment_rows, tiles.rows, blocks * segments), segments, tiles


def _data_launch(
    shapes: _Shapes, tiles: tiling.Tiles, chunks: tiling.Groups, segments: int, sums: WeightSums
) -> tuple[Launch, int, int]:
    """(launch, elements of its partial sums, tickets of these sums)."""
    of_x, of_y, wanted = shapes.of_x, shapes.of_y, shapes.wanted
    blocks = divide_up(of_x.channels, tiles.results)
    (out_units, in_units), weight_strides = tiling.stride_constants(shapes.weight)
    chunked = chunks.number > 1
    quantities = (5 if wanted.moments else 1) * chunked if wanted.gate else 2 * wanted.moments
    ticket_count = segments * blocks if quantities else 0
    launch = Launch(
        kernels.data_kernel,
        blocks * chunks.number * segments,
        (
            wanted.eps,
            segments,
            of_x.rows // segments,
            of_x.units,
            of_y.units,
            out_units,
            in_units,
            blocks,
            chunks.number,
            chunks.tiles * tiles.rows,
            ticket_count,
            sums.groups_of_set,
            sums.sets,
        ),
        {
            **shapes.constants,
            **weight_strides,
            "ROWS": tiles.rows,
            "IN": tiles.results,
            "OUT": tiles.inner,
            "WHOLE": tiles.whole,
            "CHUNKED": chunked,
            "FROZEN": wanted.frozen,
            "GROUPS": shared.merged_groups(chunks.number, tiles.results),
            **tiles.options,
        },
    )
    return launch, quantities * segments * chunks.number * of_x.channels, ticket_count


def _weight_launch(shapes: _Shapes) -> tuple[Launch, WeightSums, int]:
    """(launch, how its partial results are added up, its tickets)."""
    of_x, of_y = shapes.of_x, shapes.of_y
    tiles = tiling.weight_tiles(shapes.x.dtype, of_y.channels, of_x.channels)
    in_blocks, out_blocks = divide_up(of_x.channels, tiles.inputs), divide_up(of_y.channels, tiles.outputs)
    groups = tiling.groups_of(of_x.rows, tiles.rows, in_blocks * out_blocks, most=shapes.most_groups)
    sums = shapes.weight_sums(groups.number)
    launch = Launch(
        kernels.weight_kernel,
        in_blocks * out_blocks * groups.number,
        (
            of_x.rows,
            of_x.positions,
            of_x.units,
            of_y.units,
            in_blocks,
            out_blocks,
            groups.number,
            groups.tiles * tiles.rows,
            sums.groups_of_set,
            sums.sets,
        ),
        {
            **shapes.constants,
            "ROWS": tiles.rows,
            "IN": tiles.inputs,
            "OUT": tiles.outputs,
            "num_warps": tiles.warps,
            "num_stages": 2,
        },
    )
    return launch, sums, in_blocks * out_blocks * (sums.sets + 1) if groups.number > 1 else 0


def _of_nothing(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For a map without elements."""
    x, affine, moments, gate = call.x, call.affine, call.moments, call.gate
    samples, channels = x.shape[:2]
    none = maps.none_like(x)
    sums, coefficients = none, none.clone()
    if moments is not None and gate is not None:
        sums = none.new_zeros(4, samples, channels)
    elif moments is not None and affine is not None:
        zeros = none.new_zeros(2, channels)
        coefficients = maps.finish_coefficients(zeros, affine, moments, 0, eps=call.eps, frozen=call.frozen)
    return (
        maps.empty_map(x, *x.shape[1:]) if call.want_x else x.new_empty(0),
        none.new_zeros(call.weight.shape if call.want_weight else 0),
        none.new_zeros((samples, channels) if gate is not None else 0),
        sums,
        coefficients,
    )
