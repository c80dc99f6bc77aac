"""Which images a step sees: a function of seed and epoch alone, so that a resumed run continues as if never stopped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from biasloss_ext.errors import UserError


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for every tuple of numbers."""
    seed = 0
    for number in numbers:
        # Multiplication by a large odd constant keeps neighboring tuples apart; the generator does the mixing.
        seed = ((seed + number + 1) * 0x9E3779B97F4A7C15) % 2**63
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Order:
    """The order of training: shuffled again every epoch, the incomplete last batch left out.

    A batch is cut into ``accumulate`` parts and every part into ``processes`` equal shards, so that the images of a
    step do not depend on how many processes share it.
    """

    images: int
    batch_size: int
    seed: int = 0
    accumulate: int = 1
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        if self.batch_size > self.images:
            raise UserError(f"the batch size is {self.batch_size}, but there are {self.images} training images")
        parts = self.accumulate * self.processes
        if self.batch_size % parts:
            raise UserError(
                f"the batch size must be a multiple of {parts} ({self.processes} processes, {self.accumulate}"
                f" accumulated parts), got {self.batch_size}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.images // self.batch_size

    def batches(self, epoch: int, first_step: int = 0) -> list[Tensor]:
        """Image indices of this process, one int64 tensor for every forward pass from ``first_step`` on."""
        shuffled = torch.randperm(self.images, generator=seeded(self.seed, epoch))
        shuffled = shuffled[: self.steps * self.batch_size]
        shape = (self.steps * self.accumulate, self.processes, -1)
        return list(shuffled.view(shape)[first_step * self.accumulate :, self.process])


def evaluation_batches(images: int, batch_size: int, processes: int = 1, process: int = 0) -> list[Tensor]:
    """Every image once: the index tensors of one process."""
    return list(torch.arange(process, images, processes).split(batch_size))
