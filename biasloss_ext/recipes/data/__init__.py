"""Data sets for training."""

from __future__ import annotations

import torch

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import Data
from biasloss_ext.recipes.data.cifar import load_cifar
from biasloss_ext.recipes.data.digits import load_digits
from biasloss_ext.recipes.data.folder import load_folder
from biasloss_ext.recipes.data.idx import load_idx
from biasloss_ext.recipes.recipe import IDX_DATA, Recipe

__all__ = ["Data", "load_data"]


def load_data(recipe: Recipe, device: torch.device, workers: int = 0) -> Data:
    """The data set of a recipe; its batches come on ``device``.

    Args:
        workers: processes that read and decode images; for imagefolder alone, the others are kept in memory.

    Raises:
        UserError: no such folder, or files in it that are not what they should be.
    """
    if recipe.data == "digits":
        return load_digits(recipe.image_size, recipe.seed, device)
    if recipe.data_dir is None:
        raise UserError(f"{recipe.data} needs --data-dir, the folder where the data are")
    if recipe.data == "imagefolder":
        return load_folder(recipe.data_dir, recipe.image_size, recipe.seed, device, workers)
    if recipe.image_size != 32:
        raise UserError(f"the images of {recipe.data} are 32 x 32: leave --image-size out, got {recipe.image_size}")
    load = load_idx if recipe.data in IDX_DATA else load_cifar
    return load(recipe.data, recipe.data_dir, recipe.seed, device)
