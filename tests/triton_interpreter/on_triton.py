"""Pytest plugin: the tests of every backend, on the Triton backend alone.

For a process of its own, with TRITON_INTERPRET=1: Triton decides when it is imported whether kernels are compiled or
interpreted. Tests that have no backend to choose are left out, they need no second run.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

# A failing example is reported as it was found: shrinking it costs minutes under the interpreter.
settings.register_profile("interpreted", phases=(Phase.explicit, Phase.reuse, Phase.generate))
settings.load_profile("interpreted")


def _on_triton(mark: pytest.Mark) -> pytest.Mark:
    if mark.name == "parametrize" and mark.args[0] == "backend":
        return pytest.mark.parametrize("backend", ["triton"]).mark
    return mark


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.definition.own_markers[:] = map(_on_triton, metafunc.definition.own_markers)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others = [], []
    for item in items:
        own = "triton_interpreter" in item.path.parts
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        (chosen if own or parameters.get("backend") == "triton" else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
