"""Tiles of the Triton kernels of the 1x1 convolution: rules, not measurements at run time.

Registers bound them: results and what is summed over them, a factor in two parts where float32 is multiplied as TF32, and the
constants of a channel for every column. The compiler's figures are in tests/triton_resources.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.feature_variance.triton import BYTES_PER_LOAD, WANTED_PROGRAMS, WARPS
from biasloss_ext.ops.triton_launch import divide_up, next_power_of_two

ANOTHER_READ = 32  # what a further block of results costs: in channels, for the factor that it reads once more
LONGEST_GROUP = 128  # tiles whose deviations are summed from the mean of the first; bounds the rounding error
PARTIAL_SHARE = 4  # partial gradients of the weight are at most this part of the bytes that the kernel reads
ONE_READ_ELEMENTS = {torch.float16: 16384, torch.bfloat16: 16384, torch.float32: 2048, torch.float64: 256}


class Tiles(NamedTuple):
    """Of a product that a kernel computes: rows x results, the inner dimension in steps of ``inner``."""

    rows: int
    results: int
    inner: int
    whole: bool  # one step takes all of the inner dimension
    warps: int
    stages: int
    registers: int | None = None  # at most so many a thread, for a second block on a multiprocessor

    @property
    def options(self) -> dict[str, int]:
        """Triton's own."""
        chosen = {"num_warps": self.warps, "num_stages": self.stages}
        return chosen if self.registers is None else {**chosen, "maxnreg": self.registers}


class WeightTiles(NamedTuple):
    """Blocks of the weight, and rows a step."""

    rows: int
    outputs: int
    inputs: int
    warps: int


class Groups(NamedTuple):
    """Tiles of rows, so many to a program."""

    number: int
    tiles: int  # of a group; the last may have fewer


def _whole_depth(results: int, inner: int) -> int | None:
    """The width of a step that takes all of the inner dimension, so that a program loads the weights but once; None where
    it is better taken in steps. Padding it to a power of two costs arithmetic on the factor that is read, which does not
    matter where most of the traffic is that of the results."""
    depth = max(next_power_of_two(inner), 16)
    pads_little = 3 * depth <= 4 * inner or depth == 16
    return depth if depth <= 128 and (pads_little or results >= 2 * inner) else None


def forward_tiles(dtype: torch.dtype, results: int, inner: int) -> Tiles:
    if dtype == torch.float64:
        return Tiles(16, 16, 16, inner <= 16, WARPS, 1)
    if dtype == torch.float32:
        width, depth = shared.block_of(results, (16, 32, 64), ANOTHER_READ), 16
        return Tiles(32, width, depth, inner <= depth, 2 * WARPS if width == 64 else WARPS, 2)
    width = shared.block_of(results, (16, 32, 64, 128), ANOTHER_READ)
    whole = _whole_depth(results, inner)
    if whole is not None:
        if whole == 128:
            return Tiles(64, width, whole, True, 2 * WARPS, 2)
        warps = {128: 4 * WARPS, 64: 2 * WARPS}.get(max(width, whole), WARPS)
        return Tiles(64, width, whole, True, warps, 2, 128)
    depth = shared.block_of(inner, (16, 32), 8)
    return Tiles(64, width, depth, False, {128: 4 * WARPS, 64: 2 * WARPS}.get(width, WARPS), 2, 128)


def data_tiles(dtype: torch.dtype, results: int, inner: int, gated: bool) -> Tiles:
    """A gate adds a gradient and two sums to every channel, and with them registers."""
    if dtype == torch.float64:
        return Tiles(16, 16, 16, inner <= 16, WARPS, 1)
    if dtype == torch.float32:
        width, depth = (shared.block_of(results, (16, 32, 64), ANOTHER_READ), shared.block_of(inner, (16, 32), 8))
        return Tiles(32, width, depth, inner <= depth, 2 * WARPS if width == 64 else WARPS, 2)
    width = shared.block_of(results, (16, 32, 64, 128), ANOTHER_READ)
    whole = _whole_depth(results, inner)
    if whole is not None:
        return Tiles(32, width, whole, True, 2 * WARPS if width >= 64 else WARPS, 2)
    depth = shared.block_of(inner, (16, 32), 8)
    if gated:
        return Tiles(32, width, depth, False, 2 * WARPS if width >= 64 else WARPS, 2)
    return Tiles(64, width, depth, False, {128: 4 * WARPS, 64: 2 * WARPS}.get(width, WARPS), 2)


def one_read_tiles(dtype: torch.dtype, outputs: int, inputs: int, gated: bool) -> Tiles | None:
    """For the gradients at the input and at the weight in one kernel; None where the weight is too large for one."""
    high, wide = (max(next_power_of_two(channels), 16) for channels in (outputs, inputs))
    elements = high * wide
    if elements > ONE_READ_ELEMENTS[dtype] or wide > 128:
        return None
    if dtype == torch.float64:
        return Tiles(16, wide, high, True, WARPS, 1)
    if dtype == torch.float32:
        return Tiles(16, wide, high, True, WARPS, 2)
    if elements <= 2048:  # more inputs than outputs have no room for all their sums under a cap
        return Tiles(32, wide, high, True, WARPS, 2, 128 if wide < high else None)
    if elements <= 4096:
        return Tiles(16, wide, high, True, 2 * WARPS, 3, 128 if wide < high else None)
    return Tiles(32 if elements <= 8192 and not gated else 16, wide, high, True, 2 * WARPS, 3)


def weight_tiles(dtype: torch.dtype, outputs: int, inputs: int) -> WeightTiles:
    if dtype == torch.float64:
        return WeightTiles(16, 16, 16, WARPS)
    widest = 64 if dtype == torch.float32 else 128
    widths = tuple(width for width in (16, 32, 64, 128) if width <= widest)
    high, wide = (shared.block_of(channels, widths, ANOTHER_READ) for channels in (outputs, inputs))
    if high == wide == widest:
        high = widest // 2
    rows = 32 if dtype == torch.float32 else 64
    return WeightTiles(rows, high, wide, WARPS if high * wide <= 4096 else 2 * WARPS)


def groups_of(rows: int, tile: int, blocks: int, longest: int | None = None, most: int | None = None) -> Groups:
    """Enough programs for a GPU, else few partial results; no group of more tiles than ``longest``, but at most ``most``."""
    tiles = divide_up(rows, tile)
    wanted = divide_up(WANTED_PROGRAMS, max(blocks, 1))
    each = divide_up(tiles, wanted)
    if longest is not None:
        each = min(each, longest)
    if most is not None:
        each = max(each, divide_up(tiles, most))
    each = max(each, 1)
    return Groups(divide_up(tiles, each), each)


def groups_of_set(groups: int) -> int:
    """How many partial results one program adds up: about as many as there are sets."""
    return next_power_of_two(math.isqrt(max(groups - 1, 0)) + 1)


def stride_constants(weight: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The weight's strides as the kernels take them: (units, units), and the elements of a unit; 0 for a stride of 1."""
    most = BYTES_PER_LOAD // weight.element_size()
    strides = [1 if size == 1 else stride for size, stride in zip(weight.shape[:2], weight.stride()[:2], strict=True)]
    units = [0 if stride == 1 else math.gcd(stride, most) for stride in strides]
    outputs, inputs = (stride // max(unit, 1) for stride, unit in zip(strides, units, strict=True))
    return (outputs, inputs), {"WEIGHT_OUT": units[0], "WEIGHT_IN": units[1]}
