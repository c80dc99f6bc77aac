"""Packages that some choices need: imported when asked for, with one sentence when that fails."""

from __future__ import annotations

import importlib
from types import ModuleType

from biasloss_ext.errors import UserError


def why_not(package: str) -> str | None:
    """The reason why a package cannot be imported, in one line, or None when it can."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return f"{package} is not installed (pip install 'biasloss_ext[models]')"
    except Exception as error:  # torchvision beside another torch fails with a RuntimeError
        return f"{package} cannot be imported: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def optional(package: str, purpose: str) -> ModuleType:
    """The package, or a :class:`UserError` that says what it is needed for and why it cannot be imported."""
    reason = why_not(package)
    if reason is not None:
        raise UserError(f"{purpose} needs {package}, but {reason}")
    return importlib.import_module(package)


def torchvision(purpose: str) -> ModuleType:
    """torchvision with ``datasets``, ``models`` and ``transforms.v2``."""
    package = optional("torchvision", purpose)
    importlib.import_module("torchvision.transforms.v2")
    return package
