"""What the launches of the Triton kernels on feature maps share: tiles, groups of rows, precision, the merging launches.

Sizes, warps and stages are fixed by rules, not tuned at run time: a call can be captured in a CUDA graph once a first call
has compiled its kernels. Launches allocate outputs and partial results, and never wait for the device.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from biasloss_ext.ops import triton_map_kernels as kernels
from biasloss_ext.ops.feature_variance.triton import BYTES_PER_LOAD, WANTED_PROGRAMS, WARPS, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype

LONGEST_GROUP = 32  # tiles whose deviations are summed from the shift of the first; bounds the rounding error
MERGED_ELEMENTS = 4096  # of partial results that one step of a merge holds
MERGED_COLUMNS = 16
OLDEST_CAPABILITY_FOR_TF32 = (8, 0)
_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Rows(NamedTuple):
    """A channels_last map as a matrix."""

    rows: int  # positions of all samples
    positions: int  # of a sample
    channels: int
    vector: int  # elements that a load of a thread can take

    @property
    def units(self) -> int:
        """The channels, in vectors."""
        return self.channels // self.vector


def rows_of(x: Tensor, channels: int | None = None) -> Rows:
    """``channels`` where the map of interest has the positions and the dtype of x, but other channels."""
    positions = x.shape[2] * x.shape[3]
    channels = x.shape[1] if channels is None else channels
    return Rows(
        x.shape[0] * positions, positions, channels, math.gcd(BYTES_PER_LOAD // x.element_size(), max(channels, 1))
    )


def precision_of_products(x: Tensor) -> dict[str, Any]:
    """How `kernels.product` multiplies: float32 as exactly as float32 allows, unless torch is told that TF32 will do."""
    precision = "ieee"
    if x.dtype == torch.float32:
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            precision = "tf32"
        elif not x.is_cuda or torch.cuda.get_device_capability(x.device) >= OLDEST_CAPABILITY_FOR_TF32:
            precision = "tf32x3"
    rounded = _TRITON_DTYPES[x.dtype]
    # The interpreter's product of bfloat16 is wrong; that of the rounded values in float32 is what a GPU computes.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and not x.is_cuda
    factor = tl.float32 if interpreted and x.dtype == torch.bfloat16 else rounded
    return {"ROUNDED": rounded, "FACTOR": factor, "PRECISION": precision}


def block_of(channels: int, widths: tuple[int, ...], cost_of_block: int) -> int:
    """The width that covers the channels with the least waste, a further block costing as much as ``cost_of_block`` channels."""
    return min(widths, key=lambda width: (triton.cdiv(channels, width) * (width + cost_of_block), -width))


class Stream(NamedTuple):
    """Tiles for kernels that read a map once, without products."""

    rows: int
    channels: int
    blocks: int  # of channels

    @property
    def meta(self) -> dict[str, int]:
        return {"ROWS": self.rows, "CHANNELS": self.channels}


def stream_of(shape: Rows, x: Tensor, loads: int = 4) -> Stream:
    """Tiles of ``loads`` 16-byte loads a thread."""
    elements = WARPS * 32 * (BYTES_PER_LOAD // x.element_size()) * loads
    channels = block_of(shape.channels, (16, 32, 64, 128), 8)
    return Stream(elements // channels, channels, triton.cdiv(shape.channels, channels))


class Groups(NamedTuple):
    """Tiles of rows, so many to a program."""

    number: int
    tiles: int  # of a group; the last may have fewer


def groups_of(rows: int, tile: int, blocks: int, longest: int = LONGEST_GROUP) -> Groups:
    """Enough programs for a GPU, else few partial results; never more tiles than ``longest``."""
    tiles = triton.cdiv(rows, tile)
    wanted = triton.cdiv(WANTED_PROGRAMS, max(blocks, 1))
    per_group = max(min(triton.cdiv(tiles, wanted), longest), 1)
    return Groups(triton.cdiv(tiles, per_group), per_group)


def accumulators(x: Tensor, *shape: int) -> Tensor:
    """Uninitialised, in the accumulation dtype."""
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def partial_moments(x: Tensor, groups: int, columns: int) -> Tensor:
    """Room for what `kernels.store_moments` leaves."""
    return accumulators(x, 3 * groups * columns + groups)


def merge_moments(
    partials: Tensor, mean: Tensor | None, variance: Tensor, groups: int, columns: int, unbiased: bool
) -> None:
    wide = min(MERGED_COLUMNS, triton.next_power_of_2(columns))
    kernels.merge_moments_kernel[(triton.cdiv(columns, wide),)](
        partials,
        mean,
        variance,
        groups,
        columns,
        UNBIASED=unbiased,
        GROUPS=merged_groups(groups, wide),
        COLUMNS=wide,
        DTYPE=triton_dtype(partials.dtype),
        num_warps=2 * WARPS,
    )


def merged_groups(groups: int, columns: int) -> int:
    """Few widths, so that another batch size rarely needs another kernel."""
    most = MERGED_ELEMENTS // columns
    return next(width for width in (4, 32, most) if groups <= width or width == most)


def sum_partials(partials: Tensor, sums: Tensor, rows: int, groups: int, columns: int) -> None:
    """Into sums (rows, columns), from partials (rows, groups, columns)."""
    wide = min(2 * MERGED_COLUMNS, triton.next_power_of_2(columns))
    column_blocks = triton.cdiv(columns, wide)
    kernels.sum_partials_kernel[(rows * column_blocks,)](
        partials,
        sums,
        groups,
        columns,
        column_blocks,
        GROUPS=merged_groups(groups, 2 * wide),
        COLUMNS=wide,
        DTYPE=triton_dtype(partials.dtype),
        num_warps=WARPS,
    )


def in_order(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
