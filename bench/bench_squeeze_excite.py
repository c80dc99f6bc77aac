"""The gate of squeeze-and-excitation, beside its peers: ``pytest bench/bench_squeeze_excite.py --benchmark-only``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import groups
from biasloss_ext.benchmarks.contender import Contender, Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups.parametrize(metafunc, "squeeze_excite")


def test_squeeze_excite(benchmark: BenchmarkFixture, workload: Workload, contender: Contender) -> None:
    groups.measure(benchmark, workload, contender)
