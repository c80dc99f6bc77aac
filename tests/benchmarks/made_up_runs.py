"""An op without kernels, and runs with times that were made up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Op, Workload
from biasloss_ext.benchmarks.results import Entry, Group, Results

WORKLOAD = Workload("double", 3, (4,))


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    return (torch.randn(workload.batch, *workload.sample),)


def doubles(name: str, step: Callable[[Tensor], Tensor], role: str = "peer", **options: bool) -> Contender:
    """A contender that should return twice its input."""
    built = Built(lambda inputs: (step(inputs[0]),), lambda inputs: (2 * inputs[0].double(),))
    return Contender(name, role, lambda workload, device: built, **options)  # type: ignore[arg-type]


def op(*contenders: Contender) -> Op:
    return Op("double", contenders, make_inputs, lambda workload: Cost(96, 12, "copy"), {torch.float32: 1e-6})


def run(
    times: dict[str, float],
    *,
    noise: float = 0.02,
    groups: int = 6,
    visits: int = 3,
    seed: int = 0,
    planted: dict[tuple[int, str], float] | None = None,
) -> Results:
    """A run in which the contenders take ``times`` (seconds), all of a group slower or faster by chance in a visit.

    Args:
        noise: standard deviation of log time, of every visit of a contender and of every sample.
        planted: factors on the time of a contender in a group.
    """
    generator = np.random.default_rng(seed)
    made = []
    for index in range(groups):
        common = generator.normal(0, 3 * noise, visits)  # of the machine: hits all alike
        entries = []
        for name, seconds in times.items():
            factor = (planted or {}).get((index, name), 1.0)
            own = generator.normal(0, noise, visits)
            samples = [
                list(seconds * factor * np.exp(common[v] + own[v] + generator.normal(0, noise, 20)))
                for v in range(visits)
            ]
            role = "ours" if name == "ours" else "context" if name == "floor" else "peer"
            entries.append(Entry(name, role, wall=samples, peak_bytes=1000))
        made.append(
            Group(
                name=f"op {index} float32",
                op="op",
                shape=f"{index}",
                batch=index + 1,
                classes=0,
                dtype="float32",
                layout="contiguous",
                backward=False,
                one_set=False,
                axis="batch" if index >= groups - 2 else "",
                sets=2,
                bytes=10**6,
                flops=10**6 * (index + 1),
                ceiling="read",
                entries=entries,
            )
        )
    return Results(
        date="2026-01-02T03:04:05+00:00",
        quick=True,
        device={"type": "cpu", "name": "Some Processor", "cores": 2, "threads": 2},
        versions={"torch": "2.0", "biasloss_ext": "0"},
        ceilings={"copy": 1e10, "read": 2e10, "read_cached": 4e10, "matmul float32": 1e12},
        load_before=0.1,
        seconds=1.0,
        groups=made,
    )


TIMES = {"ours": 1e-3, "eager": 2e-3, "compiled": 1.5e-3, "floor": 0.8e-3}
