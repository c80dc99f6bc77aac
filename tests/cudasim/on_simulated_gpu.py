"""Pytest plugin for a process with BIASLOSS_SIMULATED_GPU: the tests that say something about the device.

Of tests parametrized over backends those on "cuda" are run; of the others, all in the folders `gpu` and `simulated_gpu`, and
all of the files named by ``--whole``.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import Phase, settings

# A failing example is reported as it was found: shrinking it takes minutes.
settings.register_profile("simulated", phases=(Phase.explicit, Phase.reuse, Phase.generate), derandomize=True)
settings.load_profile("simulated")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="append", default=[], help="a file whose tests are run without a backend, too")
    parser.addoption("--fill-with-nan", action="store_true", help="memory that torch leaves uninitialized holds NaN")
    parser.addoption("--examples", type=int, default=0, help="at most so many hypothesis examples a test")


def pytest_configure(config: pytest.Config) -> None:
    if not os.environ.get("BIASLOSS_SIMULATED_GPU"):
        raise pytest.UsageError("the plugin tests.cudasim.on_simulated_gpu needs BIASLOSS_SIMULATED_GPU")
    if config.getoption("--fill-with-nan"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True


def _is_chosen(item: pytest.Item, whole: list[str]) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "backend" in parameters:
        return parameters["backend"] == "cuda"
    return item.path.parent.name in ("gpu", "simulated_gpu") or item.path.name in whole


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    whole, most = config.getoption("--whole"), config.getoption("--examples")
    chosen = [item for item in items if _is_chosen(item, whole)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    for item in items:
        function = getattr(item, "obj", None)
        drawn = getattr(function, "_hypothesis_internal_use_settings", None)
        if most and drawn is not None and drawn.max_examples > most:
            function._hypothesis_internal_use_settings = settings(drawn, max_examples=most)  # type: ignore[union-attr]
