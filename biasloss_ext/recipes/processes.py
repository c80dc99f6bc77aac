"""One process or many under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from biasloss_ext.errors import SaidElsewhere, UserError

DEVICES = ("auto", "cpu", "cuda")
_SIGNS_OF_LOSS = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "remote process")


@dataclass(frozen=True)
class Processes:
    """This process among all: where it computes, and its number."""

    device: torch.device
    count: int = 1
    number: int = 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes; None where there is one."""
        return dist.group.WORLD if self.count > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.number == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The equally shaped tensors of all processes, one after the other."""
        if self.count == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(parts, value)
        return torch.cat(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """What each process hands in, in their order."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all processes the first one's buffers: batch normalization's statistics differ between shards."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.count > 1:
            dist.barrier()


def _said_once(error: Exception) -> Exception:
    """The error of a process of many, or one that is to be silent: the first to fail speaks for all."""
    try:
        first = dist.distributed_c10d._get_default_store().add("biasloss_ext failed", 1) == 1
    except Exception:  # the store went down with the process that holds it
        first = False
    if not first:
        return SaidElsewhere("another process failed")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS):
        error = UserError(
            f"process {dist.get_rank()} lost the connection to another one, which ended without a word: it was killed, or"
            " ran out of memory; the same command resumes from the last checkpoint"
        )
    if isinstance(error, UserError):
        error.of_one_process = True
    return error


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the processes that torchrun started, or stands alone; NCCL on GPUs, gloo on CPUs.

    Raises:
        UserError: no such device here.
    """
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}: there are {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU: --device must be cpu or auto here")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(torch.device("cuda" if on_gpu else "cpu"))
        return
    place = torch.device("cpu")
    if on_gpu:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(place, dist.get_world_size(), dist.get_rank())
    except Exception as error:
        raise _said_once(error) from error.__cause__
    finally:
        dist.destroy_process_group()
