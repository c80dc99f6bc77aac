"""Batch normalization over several processes: one collective per normalization in each pass.

Each process computes the moments of its part of the batch, and all are merged as in Chan, Golub and LeVeque, "Updating
formulae and a pairwise algorithm for computing sample variances", 1979. Any process group works, including gloo on CPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from biasloss_ext.ops.batch_norm import op as batch_norm

if TYPE_CHECKING:
    from biasloss_ext.nn.batch_norm import Norm
    from biasloss_ext.nn.chain_parts import Saved


class Synchronization(NamedTuple):
    """The processes over which a normalization takes its statistics."""

    group: Any  # a process group; None for all


def of_module(module: nn.Module) -> Synchronization | None:
    """How the module synchronizes its statistics; None if it does not, or if there is only one process."""
    if not isinstance(module, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group
    return Synchronization(group) if dist.get_world_size(group) > 1 else None


def statistics(
    norm: Norm, y: Tensor, own: Tensor, weight: Tensor | None, bias: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor]:
    """Statistics (4, C) of the maps of all processes and their number of values per channel, from those of this process."""
    assert norm.sync is not None
    count = own.new_full((1, y.shape[1]), y.numel() // max(y.shape[1], 1))
    of_all = _gathered(torch.cat((count, own[:2])), norm.sync)
    counts, means, variances = of_all.unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    moments = torch.stack((mean, variance))
    finished: Tensor = batch_norm.affine(moments, 0, norm_weight=weight, norm_bias=bias, eps=norm.eps, backend=backend)
    return finished, total[:1]


def _gathered(values: Tensor, sync: Synchronization) -> Tensor:
    """The tensors of all processes, stacked in a new first dimension."""
    values = values.contiguous()
    gathered = values.new_empty((dist.get_world_size(sync.group), *values.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), values, group=sync.group)
    return gathered


def coefficients(norm: Norm, own: Tensor, saved: Saved) -> Tensor:
    """Coefficients (6, C) with b and c from the sums of all processes. The gradients of the parameters stay those of this
    process, since data-parallel training averages them."""
    assert norm.sync is not None and saved.total is not None
    sums = own[4:].clone()
    dist.all_reduce(sums, group=norm.sync.group)
    scale, rstd = own[0], torch.rsqrt(saved.statistics[1] + norm.eps)
    of_weight, of_bias = sums.unbind()
    b, c = -scale * rstd * of_weight / saved.total, -scale * of_bias / saved.total
    return torch.stack((scale, b, c, own[3], own[4], own[5]))
