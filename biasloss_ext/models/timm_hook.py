"""Registers the models with timm once timm is there. It never imports timm itself: that takes seconds, and may fail."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register() -> None:
    """Registers now when timm has been imported, otherwise at the end of its import, whenever that comes."""
    if "timm.models" in sys.modules:
        _import_entrypoints()
    else:
        sys.meta_path.insert(0, _AfterTimm())


def _import_entrypoints() -> None:
    try:
        importlib.import_module("biasloss_ext.models.timm_entrypoints")
    except (ImportError, AttributeError, TypeError) as error:  # a timm that we do not know must go on working
        warnings.warn(f"the SkipblockNet models could not be registered with timm: {error!r}", stacklevel=2)


class _AfterTimm(MetaPathFinder):
    """Leaves every import to the ordinary finders; that of `timm.models` gets a last step."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm.models":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _import_entrypoints()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
