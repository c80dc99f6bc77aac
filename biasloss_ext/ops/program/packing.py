"""How the weights of quantized convolutions lie in memory, and back.

A product takes 16 outputs at a time, and for each of them four values of depth: the instruction that computes it multiplies
four bytes and adds them up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS = 16
DEPTH = 4  # also the columns of a map that a depthwise convolution reads together
COLUMN_ORDER = (0, 2, 1, 3)
LARGEST_PAIR = 128  # 255 times it fits the 16 bits in which AVX2 adds two products


def padded(values: Tensor, multiple: int = OUTPUTS) -> Tensor:
    """``values`` with zeros behind, up to a multiple of so many in the last dimension."""
    return F.pad(values, (0, -values.shape[-1] % multiple)).contiguous()


def pack(weight: Tensor) -> Tensor:
    """A weight (K, C, k, k) as (outputs / 16, depth / 4, 16, 4); depth goes by row, column and channel."""
    matrix = padded(weight.permute(0, 2, 3, 1).flatten(1), DEPTH)
    matrix = padded(matrix.T).T
    return matrix.reshape(-1, OUTPUTS, matrix.shape[1] // DEPTH, DEPTH).transpose(1, 2).contiguous()


def unpack(packed: Tensor, outputs: int, channels: int, kernel: int) -> Tensor:
    """The weight (K, C, k, k)."""
    matrix = packed.transpose(1, 2).flatten(0, 1).flatten(1)[:outputs, : kernel * kernel * channels]
    return matrix.reshape(outputs, kernel, kernel, channels).permute(0, 3, 1, 2)


def pack_taps(weight: Tensor, stride: int) -> Tensor:
    """A depthwise weight (C, 1, k, k) as (channels / 16, row, phase, groups, 16, 4).

    Four columns of the map lie together, in `COLUMN_ORDER`. A result begins at one of them, by its phase, and reaches into the
    groups that follow: as many vectors have the taps where they meet these columns, and zeros elsewhere.
    """
    channels, _, kernel, _ = weight.shape
    groups = -(-(DEPTH - stride + kernel) // DEPTH)
    phases = []
    for phase in range(DEPTH // stride):
        first = phase * stride
        phases.append(F.pad(weight[:, 0], (first, groups * DEPTH - first - kernel)))
    taps = torch.stack(phases, 2)  # (C, row, phase, columns)
    taps = F.pad(taps, (0, 0, 0, 0, 0, 0, 0, -channels % OUTPUTS))
    taps = taps.reshape(-1, OUTPUTS, kernel, DEPTH // stride, groups, DEPTH)[..., COLUMN_ORDER]
    return taps.permute(0, 2, 3, 4, 1, 5).contiguous()


def unpack_taps(packed: Tensor, channels: int, kernel: int) -> Tensor:
    """The weight (C, 1, k, k)."""
    inverse = tuple(COLUMN_ORDER.index(column) for column in range(DEPTH))
    first = packed[:, :, 0, ..., inverse].permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
    return first[:channels, None, :, :kernel]


def largest_pairs(packed: Tensor) -> Tensor:
    """Of each output of a packed weight, the largest sum of two weights of one sign that are added up first."""
    pairs = packed.unflatten(-1, (-1, 2))
    sums = torch.maximum(pairs.clamp_min(0).sum(-1), -pairs.clamp_max(0).sum(-1)).amax(-1)  # (blocks, ..., 16)
    return sums.flatten(1, -2).amax(1).flatten()
