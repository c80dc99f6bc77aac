"""Data sets for training."""

from __future__ import annotations

import importlib

import torch

from biasloss_ext.recipes.data.base import Data
from biasloss_ext.recipes.recipe import DATA_SETS, Recipe

__all__ = ["Data", "load_data"]


def load_data(recipe: Recipe, device: torch.device, workers: int = 0) -> Data:
    """The data set of a recipe; its batches come on ``device``.

    Args:
        workers: processes that read and decode images; for imagefolder alone, the others are kept in memory.

    Raises:
        UserError: no such folder, or files in it that are not what they should be.
    """
    module, function = DATA_SETS[recipe.data].loader.split(":")
    data: Data = getattr(importlib.import_module(f"{__name__}.{module}"), function)(recipe, device, workers)
    return data
