"""The data of a run: loaded, searched for broken files, and cut to what the recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.data import Data, load_data
from biasloss_ext.recipes.data.augmentation import augmentation_of
from biasloss_ext.recipes.data.images import Broken
from biasloss_ext.recipes.data.packed import PackedData
from biasloss_ext.recipes.data.sound import check_images, left_out_note
from biasloss_ext.recipes.data.subset import restrict
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.processes import Processes
from biasloss_ext.recipes.recipe import Recipe


@dataclass(frozen=True)
class RunData:
    """What :func:`open_data` found.

    Attributes:
        data: what the run trains and is tested on.
        described: what :func:`biasloss_ext.recipes.checkpoint.describe` says of the whole data set.
        left_out: broken files that the run does without, each with the reason.
        notes: sentences for the user.
    """

    data: Data
    described: dict[str, Any]
    left_out: list[Broken]
    notes: list[str]


def open_data(
    recipe: Recipe, here: Processes, workers: int, skip_broken: bool = False, display: Display | None = None
) -> RunData:
    """The data of a recipe.

    Raises:
        UserError: what :func:`load_data`, :func:`check_images` and :func:`restrict` raise.
    """
    data = load_data(recipe, here.device, workers)
    left_out = check_images(data, here, skip_broken=skip_broken, display=display)
    described = checkpoint.describe(data)
    data.augmentation = augmentation_of(recipe)
    notes = data.notes if isinstance(data, PackedData) else []
    return RunData(data, described, left_out, [*notes, *left_out_note(left_out), *restrict(data, recipe)])
