"""The model of a finished or unfinished training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from biasloss_ext.errors import UserError
from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.data.images import Preprocessing
from biasloss_ext.recipes.models import build_model
from biasloss_ext.recipes.recipe import Recipe, from_dict


def trained_recipe(folder: Path) -> Recipe:
    """What the run in ``folder`` was trained with.

    Raises:
        UserError: no checkpoint there, or one that cannot be read.
    """
    return from_dict(checkpoint.read(Path(folder) / checkpoint.NAME)["recipe"])


def load_trained(run: Path) -> nn.Module:
    """The model of a training run.

    Args:
        run: the folder of the run, or its checkpoint.

    Returns:
        The model on the CPU, in evaluation mode, with the moving average of the weights where the run keeps one. It takes
        images as the run's data set gives them and returns the scores (N, classes), whatever the loss was.

        Its ``class_names`` are a tuple of str; its ``preprocessing``, a :class:`Preprocessing
        <biasloss_ext.recipes.data.images.Preprocessing>`, makes what it takes of an image:
        ``model(model.preprocessing.read("cat.jpg")[None])``. Both are None in a checkpoint of an older version.

    Raises:
        UserError: no checkpoint there, or one that cannot be read.
    """
    path = checkpoint.path_of(Path(run))
    state = checkpoint.read(path)
    data = state["data"]
    scores_alone: dict[str, Any] = {"loss": "ce", "mean_weight_one": False, "features_from": None}
    to_build = dataclasses.replace(from_dict(state["recipe"]), **scores_alone, weights=str(path))
    model = build_model(to_build, data["classes"], data["channels"], data["image_size"]).eval()
    known = "class_names" in data
    model.class_names = tuple(data["class_names"]) if known else None  # type: ignore[assignment]
    model.preprocessing = Preprocessing.from_dict(data["preprocessing"]) if known else None  # type: ignore[assignment]
    return model


def load_described(run: Path) -> nn.Module:
    """The model of a training run as from :func:`load_trained`, whose class names and preprocessing are known.

    Raises:
        UserError: no checkpoint there, or one of an older version.
    """
    model = load_trained(run)
    if model.preprocessing is None:
        raise UserError(
            f"{checkpoint.path_of(run)} was written by an older version, without class names and preprocessing: train again"
        )
    return model
