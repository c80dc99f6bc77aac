"""What the engine measures: a workload, and the contenders that do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Role = Literal["ours", "variant", "peer", "context"]
Inputs = tuple[Tensor, ...]
Step = Callable[[Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class Workload:
    """One shape, dtype and layout of one op: a group of the tables.

    Attributes:
        op: name in `ops.OPS`.
        batch: samples.
        sample: shape of one sample's features, or of one image.
        classes: width of the scores; 0 where there are none.
        dtype: of features and scores; for a network that of autocast, float32 for none.
        channels_last: memory format of the features; None leaves it to the contender.
        backward: forward and backward are timed together; otherwise the forward pass alone.
        gradient: that gradient alone is timed, of the input or of the weight, in place of the forward pass.
        one_set: the same inputs over and over, so that they may stay in the cache; otherwise several sets in turn.
        axis: the sweep that the workload is part of: "batch", "classes" or none.
        options: what else the op must know, as (("kernel_size", 3), ("stride", 1)).
    """

    op: str
    batch: int
    sample: tuple[int, ...]
    classes: int = 0
    dtype: torch.dtype = torch.float32
    channels_last: bool | None = False
    backward: bool = False
    gradient: Literal["", "input", "weight"] = ""
    one_set: bool = False
    axis: Literal["", "batch", "classes"] = ""
    options: tuple[tuple[str, int], ...] = ()

    def option(self, name: str) -> int:
        return dict(self.options)[name]

    @property
    def activations(self) -> int:
        return self.batch * math.prod(self.sample)

    @property
    def layout(self) -> str:
        if self.channels_last is None:
            return ""
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def shape_name(self) -> str:
        shape = "x".join(str(size) for size in (self.batch, *self.sample))
        if self.classes:
            shape += f"/{self.classes}"
        return " ".join([shape, *(f"{name}={value}" for name, value in self.options)])

    @property
    def name(self) -> str:
        parts = [self.op, self.shape_name, dtype_name(self.dtype)]
        if self.layout:
            parts.append(self.layout)
        if self.gradient:
            parts.append(f"gradient of the {self.gradient}")
        else:
            parts.append("forward+backward" if self.backward else "forward")
        if self.one_set:
            parts.append("one input set")
        if self.axis:
            parts.append(f"sweep of {self.axis}")
        return " ".join(parts)


class Cost(NamedTuple):
    """The least that a workload takes.

    Attributes:
        bytes: each input read once, each output written once.
        flops: arithmetic operations, a multiply-add counted as two.
        ceiling: which of the machine's ceilings bounds it: of reading memory, of reading and writing it, of arithmetic.
    """

    bytes: int
    flops: int
    ceiling: Literal["read", "copy", "matmul"]


class Built(NamedTuple):
    """A contender made ready for one workload.

    Attributes:
        step: what is timed; it returns what it computed.
        exact: the same in float64 by other means, for the check.
    """

    step: Step
    exact: Step


class Unavailable(Exception):
    """Why a contender cannot take part, in words for the table."""


@dataclass(frozen=True)
class Contender:
    """One way to do a workload.

    Attributes:
        name: shown in tables.
        role: "ours"; "variant", ours used in another way; "peer", which computes the same; "context", which computes
            something else: a floor that cannot be beaten by much, or another network.
        build: makes it ready; raises `Unavailable` with the reason where it cannot run.
        capturable: the step may be captured in a CUDA graph: it neither waits for the device nor branches on its values.
        overwrites_inputs: it gets inputs of its own.
        own_threads: it keeps a thread pool besides PyTorch's, which is given a moment to come to rest.
        channels_last: memory format of its images where the workload leaves it open; it gets inputs of its own then.
        slow_on: kinds of devices, "cpu" or "cuda", where it is so slow to build that quick runs leave it out.
        passes: the workloads that it takes part in: "forward", "backward", which has both passes, or "both".
    """

    name: str
    role: Role
    build: Callable[[Workload, torch.device], Built]
    capturable: bool = False
    overwrites_inputs: bool = False
    own_threads: bool = False
    channels_last: bool = False
    slow_on: tuple[str, ...] = ()
    passes: Literal["forward", "backward", "both"] = "both"

    def takes_part(self, workload: Workload) -> bool:
        return self.passes == "both" or (self.passes == "backward") == workload.backward


class Op(NamedTuple):
    """An op or a network with all its contenders.

    Attributes:
        name: as on the command line.
        contenders: ours first.
        make_inputs: fresh random inputs of a workload.
        cost: the least that a workload takes.
        tolerance: relative error against float64 up to which a contender counts as right, by dtype.
        draws: of inputs, one of which has to be within the tolerance. More than one where a rounding may put a value on the
            other side of an activation's kink than in float64, and so change gradients by far more than a rounding; what
            is computed wrongly is wrong in every draw.
    """

    name: str
    contenders: tuple[Contender, ...]
    make_inputs: Callable[[Workload, torch.device], Inputs]
    cost: Callable[[Workload], Cost]
    tolerance: dict[torch.dtype, float]
    draws: int = 1


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
