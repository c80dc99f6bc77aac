"""How many images per second the data pipeline gives, and how many the training step takes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data import Data
from biasloss_ext.recipes.loop import Run
from biasloss_ext.recipes.order import Order
from biasloss_ext.recipes.processes import processes
from biasloss_ext.recipes.recipe import Recipe
from biasloss_ext.recipes.run_data import open_data

WARM_UP = 3  # batches, in which workers start and kernels are loaded

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Speed:
    """Images per second, each measured without the others.

    Attributes:
        pipeline: reading, augmenting, and moving to the device.
        step: forward and backward pass and optimizer, on a batch that is there.
        beside: the pipeline of the image folder that was named for comparison, if any.
    """

    pipeline: float
    step: float
    beside: float | None = None

    @property
    def verdict(self) -> str:
        if self.pipeline < self.step:
            return (
                "the data pipeline limits training: raise --workers up to the number of cores, or store smaller images"
                " (biasloss data pack)"
            )
        return "the training step limits training, not the data pipeline"


def measure_speed(
    recipe: Recipe,
    *,
    device: str = "auto",
    workers: int = 0,
    skip_broken: bool = False,
    seconds: float = 10.0,
    beside: str | None = None,
) -> Speed:
    """Runs the pipeline of a recipe without the model, then its training step without the pipeline; writes nothing.

    Args:
        device, workers, skip_broken: as for :func:`biasloss_ext.recipes.loop.train`.
        seconds: for each measurement, about.
        beside: an image folder whose pipeline is measured too.

    Raises:
        UserError: ``seconds`` is not above 0, or what :func:`biasloss_ext.recipes.loop.train` raises before its first step.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the speed is that of one process: start it without torchrun")
    if not seconds > 0:
        raise UserError(f"--seconds must be above 0, got {seconds}")
    with processes(device) as here:
        run = Run(recipe, open_data(recipe, here, workers, skip_broken), here)
        run.model.train()
        batches = endless_batches(run.data, run.order)
        again = itertools.repeat(next(batches))
        pipeline = _rate(lambda: next(batches), seconds, here.device)
        batches.close()  # ends its workers
        step = _rate(lambda: run.take_step(again), seconds, here.device)
        of_folder = None
        if beside is not None:
            folder = dataclasses.replace(recipe, data="imagefolder", data_dir=beside)
            data = open_data(folder, here, workers, skip_broken).data
            batches = endless_batches(data, Order(data.train_images, recipe.batch_size, recipe.seed, recipe.accumulate))
            of_folder = _rate(lambda: next(batches), seconds, here.device) * recipe.batch_size / recipe.accumulate
            batches.close()
    return Speed(pipeline * recipe.batch_size / recipe.accumulate, step * recipe.batch_size, of_folder)


def endless_batches(data: Data, order: Order) -> Generator[Batch, None, None]:
    """Those of training, epoch after epoch."""
    for epoch in itertools.count():
        yield from data.train_batches(epoch, order.batches(epoch))


def _rate(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Calls per second, after some to warm up."""

    def finished() -> float:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(WARM_UP):
        start = now = finished()
    calls = 0
    while calls == 0 or now - start < seconds:
        now, calls = finished(), calls + 1
    return calls / (now - start)
