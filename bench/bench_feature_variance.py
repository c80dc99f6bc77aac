"""The variance of the features, beside its peers: ``pytest bench/bench_feature_variance.py --benchmark-only``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import groups
from biasloss_ext.benchmarks.contender import Contender, Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups.parametrize(metafunc, "feature_variance")


def test_feature_variance(benchmark: BenchmarkFixture, workload: Workload, contender: Contender) -> None:
    groups.measure(benchmark, workload, contender)
