"""How the weights of a program's 1x1 convolutions lie in memory, and back: one vector of outputs behind the other, so that what a
product reads next lies behind what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from biasloss_ext.ops.native import native

VECTOR_BYTES = {"avx512": 64, "avx2": 32}  # of other variants 16


def by_vectors(weight: Tensor) -> Tensor:
    """A weight (K, C, 1, 1) as (vectors, C, lanes) of this CPU.

    The last vector overlaps the one before it. Where there are fewer outputs than lanes, it is filled up with zeros.
    """
    outputs, inputs = weight.shape[:2]
    lanes = VECTOR_BYTES.get(native().build.get("cpu_variant_in_use", ""), 16) // weight.element_size()
    if outputs < lanes:
        packed = weight.new_zeros(1, inputs, lanes)
        packed[0, :, :outputs] = weight.flatten(1).T
        return packed
    last = outputs - lanes
    return torch.stack([weight[at : at + lanes].flatten(1).T for at in (*range(0, last, lanes), last)])


def by_outputs(packed: Tensor, outputs: int) -> Tensor:
    """The weight (K, C, 1, 1), which may be given as it is."""
    if packed.dim() == 4:
        return packed
    rows = packed.transpose(1, 2).flatten(0, 1)
    if outputs < packed.shape[2]:
        return rows[:outputs, :, None, None]
    whole = (packed.shape[0] - 1) * packed.shape[2]
    return torch.cat((rows[:whole], rows[rows.shape[0] - outputs + whole :]))[:, :, None, None]
