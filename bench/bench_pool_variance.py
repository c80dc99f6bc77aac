"""Pool and variance behind a normalization, beside its peers: ``pytest bench/bench_pool_variance.py --benchmark-only``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import groups
from biasloss_ext.benchmarks.contender import Contender, Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups.parametrize(metafunc, "pool_variance")


def test_pool_variance(benchmark: BenchmarkFixture, workload: Workload, contender: Contender) -> None:
    groups.measure(benchmark, workload, contender)
