"""Registers the models with timm after its import. It never imports timm itself, which takes seconds and may fail."""

from __future__ import annotations

import importlib
import warnings

from biasloss_ext.when_imported import when_imported


def register() -> None:
    """Register now if timm has been imported, otherwise at the end of its import."""
    when_imported("timm.models", _import_entrypoints)


def _import_entrypoints() -> None:
    try:
        importlib.import_module("biasloss_ext.models.timm_entrypoints")
    except (ImportError, AttributeError, TypeError) as error:  # an unknown version of timm must keep working
        warnings.warn(f"the SkipblockNet models could not be registered with timm: {error!r}", stacklevel=2)
