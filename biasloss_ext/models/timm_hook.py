"""Registers the models with timm once timm is there. It never imports timm itself: that takes seconds, and may fail."""

from __future__ import annotations

import importlib
import warnings

from biasloss_ext.when_imported import when_imported


def register() -> None:
    """Registers now when timm has been imported, otherwise at the end of its import, whenever that comes."""
    when_imported("timm.models", _import_entrypoints)


def _import_entrypoints() -> None:
    try:
        importlib.import_module("biasloss_ext.models.timm_entrypoints")
    except (ImportError, AttributeError, TypeError) as error:  # a timm that we do not know must go on working
        warnings.warn(f"the SkipblockNet models could not be registered with timm: {error!r}", stacklevel=2)
