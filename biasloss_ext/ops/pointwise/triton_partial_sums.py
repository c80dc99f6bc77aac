"""How the programs that are last add up what the others of a gradient of the 1x1 convolution leave."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import columns_from, is_last, merge_sums
from biasloss_ext.ops.triton_map_kernels import Tile, offsets_of


@triton.jit
def sum_blocks(partials_ptr, offsets, inside, stride, count):
    """The sum of ``count`` blocks, ``stride`` (in 64 bits) apart."""
    total = tl.load(partials_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    for index in range(1, count):
        total += tl.load(partials_ptr + index * stride + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def finish_weight(
    total,
    grad_weight_ptr,
    partials_ptr,
    sets_ptr,
    tickets_ptr,
    first_ticket,
    group,
    groups,
    groups_of_set,
    sets,
    block,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store a `WeightBlock` of the weight's gradient; where it is SPLIT, the last program adds up what the others left.

    One program alone would take long to read the partial results of hundreds: the last program of a set adds up its own, the
    last of all sets adds up the sets. From ``first_ticket`` on there is one ticket for the sets, then one for each of them.
    """
    tile = Tile(block.first_out.to(tl.int64), block.outputs, block.first_in, block.inputs)
    offsets, inside = offsets_of(tile, OUT, IN)
    offsets += block.first_out * block.inputs
    if SPLIT:
        size = block.outputs.to(tl.int64) * block.inputs
        tl.store(partials_ptr + group * size + offsets, total, mask=inside)
        own = (group // groups_of_set).to(tl.int32)
        first = own * groups_of_set
        members = tl.minimum(groups - first, groups_of_set)
        if is_last(tickets_ptr + first_ticket + 1 + own, members):
            total = sum_blocks(partials_ptr + first.to(tl.int64) * size, offsets, inside, size, members)
            tl.store(sets_ptr + own.to(tl.int64) * size + offsets, total, mask=inside)
            if is_last(tickets_ptr + first_ticket, sets):
                total = sum_blocks(sets_ptr, offsets, inside, size, sets)
                tl.store(grad_weight_ptr + offsets, total, mask=inside)
    else:
        tl.store(grad_weight_ptr + offsets, total, mask=inside)


@triton.jit
def store_totals(first_ptr, stride, totals, place, exists):
    """Store four quantities, ``stride`` apart."""
    for index in tl.static_range(4):
        tl.store(first_ptr + stride * index + place, totals[index], mask=exists)


@triton.jit
def finish_sums_of_sample(
    gate_total,
    totals,
    gate_grad_ptr,
    sums_ptr,
    partials_ptr,
    tickets_ptr,
    sample,
    samples,
    chunk,
    chunks,
    in_blocks,
    first_in,
    channels,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    CHUNKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Store what is summed over a sample: for the gate, and four ``totals``. Where the sample is CHUNKED, its last program adds
    up what the others left, which is (quantities, samples, chunks, channels)."""
    at = columns_from(first_in, channels, IN)
    exists = at.exists
    place = sample * channels + at.column
    quantity = samples.to(tl.int64) * channels
    if CHUNKED:
        partial = (sample * chunks + chunk) * channels + at.column
        tl.store(partials_ptr + partial, gate_total, mask=exists)
        if sums_ptr is not None:
            store_totals(partials_ptr + quantity * chunks, quantity * chunks, totals, partial, exists)
        if is_last(tickets_ptr + sample * in_blocks + first_in // IN, chunks):
            left = partials_ptr + sample * chunks * channels
            total = merge_sums(left, chunks, at, GROUPS, IN, DTYPE)
            tl.store(gate_grad_ptr + place, total, mask=exists)
            if sums_ptr is not None:
                for index in range(4):
                    left += quantity * chunks
                    total = merge_sums(left, chunks, at, GROUPS, IN, DTYPE)
                    tl.store(sums_ptr + quantity * index + place, total, mask=exists)
    else:
        tl.store(gate_grad_ptr + place, gate_total, mask=exists)
        if sums_ptr is not None:
            store_totals(sums_ptr, quantity, totals, place, exists)
