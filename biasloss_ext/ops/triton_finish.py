"""What the last program of a Triton kernel does: it adds up the partial results of the others."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Norm(NamedTuple):
    """Pointers of a normalization, any of which may be None."""

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any


class Back(NamedTuple):
    """Pointers to the coefficients of a normalization and to what they follow from, apart from sums."""

    coefficients: Any
    affine: Any
    moments: Any
    eps: Any


class Columns(NamedTuple):
    """Some columns of a matrix of ``columns``, and which of them exist."""

    column: Any
    columns: Any
    exists: Any


@triton.jit
def columns_from(first, columns, COLUMNS: tl.constexpr):
    column = first + tl.arange(0, COLUMNS)
    return Columns(column, columns, column < columns)


@triton.jit
def is_last(ticket_ptr, total):
    """Whether this is the last of ``total`` programs to call this with the ticket, which that program leaves at 0.

    What any of the programs stored before its call, the last one may load after its own, with ``cache_modifier=".cg"``:

    - Before: the stores of all threads come before the barrier, and the barrier before the atomic operation, which one thread
      executes. A release is cumulative in the PTX memory model: it also publishes what happened before it in other threads of
      the block. The scope is the GPU.
    - Between: the atomic operations on one ticket form a release sequence, and the last of them acquires from all before.
    - After: Triton hands the result from that one thread to the others through shared memory, behind a barrier, so that what
      it acquired happened before their loads too. ``.cg`` loads from the L2 cache: a line of the L1 cache, which other
      multiprocessors do not update, cannot serve them.

    Nobody else touches the ticket between the last arrival and the next launch of the stream: a plain store resets it.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(ticket_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def merge_moments(partials_ptr, groups, at, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """(mean, squared deviations from it, count) of the COLUMNS columns ``at`` from what `store_moments` left.

    Lane by lane, GROUPS groups at a time, and then over the lanes (Chan, Golub and LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979): no exchange between threads holds up the loads. Means are kept relative
    to the first group's shift, so that a mean of a thousand standard deviations costs no accuracy.
    """
    row = groups.to(tl.int64) * at.columns
    reference = tl.load(partials_ptr + at.column, mask=at.exists, other=0.0, cache_modifier=".cg")
    counts = tl.zeros([GROUPS], DTYPE)
    means = tl.zeros([GROUPS, COLUMNS], DTYPE)
    m2s = tl.zeros([GROUPS, COLUMNS], DTYPE)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None] & at.exists[None, :]
        count = tl.load(partials_ptr + row * 3 + group, mask=group < groups, other=0.0, cache_modifier=".cg")
        pointers = partials_ptr + group.to(tl.int64)[:, None] * at.columns + at.column[None, :]
        shift = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
        mean = tl.load(pointers + row, mask=inside, other=0.0, cache_modifier=".cg")
        m2 = tl.load(pointers + row * 2, mask=inside, other=0.0, cache_modifier=".cg")

        together = counts + count
        fraction = count / tl.maximum(together, 1.0)
        # Where there is no group the fraction is 0, but NaN or infinity would still come through a product with it.
        delta = tl.where(inside, (shift - reference[None, :]) + mean - means, 0.0)
        means += delta * fraction[:, None]
        m2s += m2 + delta * delta * (counts * fraction)[:, None]
        counts = together
    total = tl.sum(counts, 0)
    mean_of_all = tl.sum(means * counts[:, None], 0) / total
    deviation = means - mean_of_all[None, :]
    return reference + mean_of_all, tl.sum(m2s + deviation * deviation * counts[:, None], 0), total


@triton.jit
def finish_statistics(statistics_ptr, norm, at, mean, variance, count, momentum, eps):
    """Store mean, variance, scale and shift of the columns ``at``, and move their running statistics."""
    column, columns, exists = at
    scale = 1.0 / tl.sqrt(variance + eps)
    if norm.weight is not None:
        scale *= tl.load(norm.weight + column, mask=exists, other=0.0)
    shift = -scale * mean
    if norm.bias is not None:
        shift += tl.load(norm.bias + column, mask=exists, other=0.0)
    tl.store(statistics_ptr + column, mean, mask=exists)
    tl.store(statistics_ptr + columns + column, variance, mask=exists)
    tl.store(statistics_ptr + columns * 2 + column, scale, mask=exists)
    tl.store(statistics_ptr + columns * 3 + column, shift, mask=exists)
    if norm.running_mean is not None:
        running = tl.load(norm.running_mean + column, mask=exists, other=0.0)
        moved = running + momentum * (mean - running)
        tl.debug_barrier()  # several threads may have loaded what one of them stores
        tl.store(norm.running_mean + column, moved, mask=exists)
    if norm.running_var is not None:
        unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
        running = tl.load(norm.running_var + column, mask=exists, other=0.0)
        moved = running + momentum * (unbiased - running)
        tl.debug_barrier()
        tl.store(norm.running_var + column, moved, mask=exists)


@triton.jit
def count_batch(num_batches_tracked_ptr):
    tl.atomic_add(num_batches_tracked_ptr, 1, sem="relaxed")


@triton.jit
def merge_sums(partials_ptr, groups, at, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """The sum over the groups of partials (groups, columns), of the columns ``at``."""
    total = tl.zeros([GROUPS, COLUMNS], DTYPE)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None] & at.exists[None, :]
        pointers = partials_ptr + group.to(tl.int64)[:, None] * at.columns + at.column[None, :]
        total += tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def finish_coefficients(back, at, sum_du, sum_du_away, count, FROZEN: tl.constexpr):
    """Store the six rows of coefficients of the columns ``at``."""
    column, columns, exists = at
    scale = tl.load(back.affine + column, mask=exists, other=0.0)
    mean = tl.load(back.moments + column, mask=exists, other=0.0)
    variance = tl.load(back.moments + columns + column, mask=exists, other=0.0)
    rstd = 1.0 / tl.sqrt(variance + back.eps)
    b = tl.zeros_like(scale)
    c = tl.zeros_like(scale)
    if not FROZEN:
        b = -scale * rstd * rstd * sum_du_away / count
        c = -scale * sum_du / count
    tl.store(back.coefficients + column, scale, mask=exists)
    tl.store(back.coefficients + columns + column, b, mask=exists)
    tl.store(back.coefficients + columns * 2 + column, c, mask=exists)
    tl.store(back.coefficients + columns * 3 + column, mean, mask=exists)
    tl.store(back.coefficients + columns * 4 + column, rstd * sum_du_away, mask=exists)
    tl.store(back.coefficients + columns * 5 + column, sum_du, mask=exists)


@triton.jit
def finish_sums(
    sums,
    back,
    partials_ptr,
    ticket_ptr,
    group,
    groups,
    at,
    count,
    FROZEN: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Leave the ``sums`` of du and of du * (y - mean) over one group of rows in partials (2, groups, columns), of the columns
    ``at``; the last of the groups finishes their coefficients. ``count`` values per column were summed by all groups together."""
    row = groups.to(tl.int64) * at.columns
    pointers = partials_ptr + group.to(tl.int64) * at.columns + at.column
    tl.store(pointers, sums[0], mask=at.exists)
    tl.store(pointers + row, sums[1], mask=at.exists)
    if is_last(ticket_ptr, groups):
        total = merge_sums(partials_ptr, groups, at, GROUPS, COLUMNS, DTYPE)
        total_away = merge_sums(partials_ptr + row, groups, at, GROUPS, COLUMNS, DTYPE)
        finish_coefficients(back, at, total, total_away, count.to(DTYPE), FROZEN)
