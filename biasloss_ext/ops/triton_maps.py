"""What the launches of the Triton kernels on feature maps share: tiles, groups of rows, precision, layouts.

Sizes, warps and stages are fixed by rules, not tuned at run time: a call can be captured in a CUDA graph once a first call
has compiled its kernels. Launches allocate outputs and partial results, and never wait for the device.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from biasloss_ext.ops.feature_variance.triton import BYTES_PER_LOAD, WANTED_PROGRAMS, WARPS
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.maps import Norm, channels_last, finish_statistics
from biasloss_ext.ops.triton_launch import Launch, divide_up

LONGEST_GROUP = 32  # tiles whose deviations are summed from the shift of the first; bounds the rounding error
MERGED_ELEMENTS = 2048  # of partial results that one step of a merge holds
OLDEST_CAPABILITY_FOR_TF32 = (8, 0)
# What torch.backends.cuda.matmul.fp32_precision asks, without the microsecond of a property of a module.
_FP32_PRECISION = torch._C._get_fp32_precision_getter
_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Plan(NamedTuple):
    """A launch for maps of one shape, and what is to be allocated for it."""

    launch: Launch
    strides: tuple[int, ...]
    wide: torch.dtype
    partials: int
    tickets: int
    partial_moments: int = 0


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


def precision_setting(x: Tensor) -> str | None:
    """What a plan depends on besides its tensors."""
    return _FP32_PRECISION("cuda", "matmul") if x.dtype is torch.float32 else None


def block_of(channels: int, widths: tuple[int, ...], cost_of_block: int) -> int:
    """The width that covers the channels with the least waste, a further block costing as much as ``cost_of_block`` channels."""
    return min(widths, key=lambda width: (divide_up(channels, width) * (width + cost_of_block), -width))


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
    return Stream(elements // channels, channels, divide_up(shape.channels, channels))


class Groups(NamedTuple):
    """Tiles of rows, so many to a program."""

    number: int
    tiles: int  # of a group; the last may have fewer


def groups_of(rows: int, tile: int, blocks: int, longest: int = LONGEST_GROUP) -> Groups:
    """Enough programs for a GPU, else few partial results; never more tiles than ``longest``."""
    tiles = divide_up(rows, tile)
    wanted = divide_up(WANTED_PROGRAMS, max(blocks, 1))
    per_group = max(min(divide_up(tiles, wanted), longest), 1)
    return Groups(divide_up(tiles, per_group), per_group)


def accumulators(x: Tensor, *shape: int) -> Tensor:
    """Uninitialized, in the accumulation dtype."""
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def merged_groups(groups: int, columns: int) -> int:
    """Few widths, so that another batch size rarely needs another kernel."""
    most = max(MERGED_ELEMENTS // columns, 4)
    return next(width for width in (4, 32, most) if groups <= width or width >= most)


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Their part of a plan's key: which are given, and of what they are."""
    return tuple([None if t is None else t.dtype for t in tensors])


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a map of this shape in channels_last order."""
    _, channels, height, width = shape
    return (height * width * channels, 1, width * channels, channels)


def dense(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` in channels_last order, which has these strides."""
    return x if x.stride() == strides else channels_last(x)


def in_order(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def statistics_of_nothing(x: Tensor, channels: int, **norm: Any) -> Tensor:
    """Statistics (4, C) of a map without elements."""
    moments = x.new_zeros((2, channels), dtype=accumulation_dtype(x.dtype))
    return finish_statistics(moments, 0, Norm(**norm))
