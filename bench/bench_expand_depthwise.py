"""Expansion and depthwise convolution in one: ``pytest bench/bench_expand_depthwise.py --benchmark-only``."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import groups
from biasloss_ext.benchmarks.contender import Contender, Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups.parametrize(metafunc, "expand_depthwise")


def test_expand_depthwise(benchmark: BenchmarkFixture, workload: Workload, contender: Contender) -> None:
    groups.measure(benchmark, workload, contender)
