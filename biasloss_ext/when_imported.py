"""Runs a step after the import of a module that this package must not import itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def when_imported(name: str, step: Callable[[], None]) -> None:
    """Call ``step`` now if the module has been imported, otherwise at the end of its import."""
    if name in sys.modules:
        step()
    else:
        sys.meta_path.insert(0, _After(name, step))


class _After(MetaPathFinder):
    """Leaves all imports to the ordinary finders, and runs a step after the import of one module."""

    def __init__(self, name: str, step: Callable[[], None]) -> None:
        self.name, self.step = name, step

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_step(module: ModuleType) -> None:
                execute(module)
                self.step()

            spec.loader.exec_module = execute_and_step  # type: ignore[method-assign]
        return spec
