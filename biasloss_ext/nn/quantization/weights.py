"""Rounds weights to signed bytes, with one step for each output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from biasloss_ext.ops.program.packing import LARGEST_PAIR, largest_pairs

LARGEST_WEIGHT = 127
LARGEST_BIAS = 2**30


def quantized_weight(
    weight: Tensor, bias: Tensor, x_step: float, packing: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The weight in whole numbers, in float64, and the step of each output.

    A step is larger than the weights ask for where the bias would not fit int32 otherwise, or where the products of a pair of
    weights would not fit the 16 bits in which AVX2 adds them up. So all instruction sets compute the same sums.

    Args:
        weight: (K, C, k, k), or (C, 1, k, k) of a depthwise convolution.
        bias: (K,), of the layer.
        x_step: of the levels of the input.
        packing: lays the weight out, which says what the pairs are.
    """
    rows = weight.double()
    step = rows.flatten(1).abs().amax(1) / LARGEST_WEIGHT
    # Rounding adds at most a half to each of the two.
    step = torch.maximum(step, largest_pairs(packing(rows))[: len(rows)] / (LARGEST_PAIR - 1))
    step = torch.maximum(step, bias.double().abs() / (x_step * (LARGEST_BIAS // 2)))
    step = step.clamp_min(torch.finfo(torch.float32).tiny * 2**20).float().double()
    quantized = (rows / step[:, None, None, None]).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    return quantized, step
