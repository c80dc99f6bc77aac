"""`pytest bench --benchmark-only` times; without the option every benchmark runs once."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="shapes that run the code and say nothing about speed")
    parser.addoption("--full", action="store_true", help="every shape, the sweeps too; otherwise those of --quick")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # The project's own options disable timing, for the tests' sake; pytest-benchmark takes both for a contradiction.
    if config.getoption("benchmark_only"):
        config.option.benchmark_disable = False
