"""Every op and network beside its peers, in pytest-benchmark's tables and files: ``pytest bench --benchmark-only -k depthwise``.

The engine of `biasloss bench` measures, one contender at a time. Where they should take turns, use that command.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from biasloss_ext.benchmarks import engine, shapes
from biasloss_ext.benchmarks.contender import Contender, Workload
from biasloss_ext.benchmarks.ops import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = dataclasses.replace(engine.FULL, visits=1)


class Replay:
    """A timer between whose readings lie the durations that the engine measured."""

    def __init__(self) -> None:
        self.readings = itertools.repeat(0.0)

    def take(self, seconds: Sequence[float]) -> None:
        """Go on with these durations: pytest-benchmark reads before and after each."""
        self.readings = iter([reading for duration in seconds for reading in (0.0, duration)])

    def __call__(self) -> float:
        return next(self.readings)


REPLAY = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tiny, full = metafunc.config.getoption("--tiny"), metafunc.config.getoption("--full")
    pairs = [
        pytest.param(workload, contender, id=f"{workload.name}-{contender.name}".replace(" ", "_"))
        for op in OPS.values()
        for workload in shapes.workloads(op.name, DEVICE.type, quick=not full, tiny=tiny)
        for contender in op.contenders
        if contender.takes_part(workload) and (full or tiny or DEVICE.type not in contender.slow_on)
    ]
    metafunc.parametrize(("workload", "contender"), pairs)


@pytest.mark.benchmark(timer=REPLAY)
def test_op(
    benchmark: BenchmarkFixture, workload: Workload, contender: Contender, request: pytest.FixtureRequest
) -> None:
    plan = engine.TINY if request.config.getoption("--tiny") else PLAN
    alone = OPS[workload.op]._replace(contenders=(contender,))
    (entry,) = engine.measure(alone, workload, DEVICE, plan).entries
    if entry.status == "unavailable":
        pytest.skip(entry.reason)
    assert entry.status == "ok", entry.reason
    benchmark.group = workload.name
    seconds = entry.samples()
    REPLAY.take(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
