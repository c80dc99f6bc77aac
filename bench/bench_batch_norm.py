"""Batch normalization with its activation, beside its peers: ``pytest bench/bench_batch_norm.py --benchmark-only``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import groups
from biasloss_ext.benchmarks.contender import Contender, Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups.parametrize(metafunc, "batch_norm")


def test_batch_norm(benchmark: BenchmarkFixture, workload: Workload, contender: Contender) -> None:
    groups.measure(benchmark, workload, contender)
