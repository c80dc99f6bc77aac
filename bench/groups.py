"""pytest-benchmark groups out of `biasloss_ext.benchmarks`: one group a workload, one entry a contender.

pytest-benchmark times one contender after another; where they should take turns, use ``biasloss bench``.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from biasloss_ext.benchmarks import engine, machine, shapes
from biasloss_ext.benchmarks.contender import Contender, Unavailable, Workload
from biasloss_ext.benchmarks.ops import OPS
from biasloss_ext.benchmarks.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 30
WARM_UP_ROUNDS = 5


def parametrize(metafunc: pytest.Metafunc, op: str) -> None:
    """Give the test of ``metafunc`` every workload and contender of ``op``."""
    tiny, full = metafunc.config.getoption("--tiny"), metafunc.config.getoption("--full")
    pairs = [
        pytest.param(workload, contender, id=f"{workload.name}-{contender.name}".replace(" ", "_"))
        for workload in shapes.workloads(op, DEVICE.type, quick=not full, tiny=tiny)
        for contender in OPS[op].contenders
        if contender.takes_part(workload) and (full or tiny or DEVICE.type not in contender.slow_on)
    ]
    metafunc.parametrize(("workload", "contender"), pairs)


def measure(benchmark: BenchmarkFixture, workload: Workload, contender: Contender) -> None:
    """Check a contender against float64, then time it with inputs that change from call to call."""
    op = OPS[workload.op]
    benchmark.group = workload.name
    try:
        step, _ = engine.prepare(op, contender, workload, DEVICE)
    except Unavailable as reason:
        pytest.skip(str(reason))
    held = sum(tensor.numel() * tensor.element_size() for tensor in op.make_inputs(workload, DEVICE))
    count = 1 if workload.one_set else machine.input_sets(held, DEVICE)
    sets = [engine.inputs_of(contender, workload, op.make_inputs(workload, DEVICE)) for _ in range(count)]
    turns = itertools.cycle(sets)

    def call() -> None:
        step(next(turns))
        synchronize(DEVICE)

    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)
