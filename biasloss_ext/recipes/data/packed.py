"""A packed data set: shards of images that were resized once, see :mod:`biasloss_ext.recipes.data.shards`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import data_folder
from biasloss_ext.recipes.data.folder import PACKED
from biasloss_ext.recipes.data.images import BoxOf, Broken
from biasloss_ext.recipes.data.shards import FORMAT, Shard
from biasloss_ext.recipes.data.stored import StoredData
from biasloss_ext.recipes.recipe import Recipe

Place = tuple[Shard, int]  # a shard, and an image's row in it


def load_packed(recipe: Recipe, device: torch.device, workers: int) -> PackedData:
    """Open the data set that `biasloss data pack` wrote into a folder.

    Raises:
        UserError: no such folder, or its files are missing, broken or do not fit together.
    """
    folder = data_folder(recipe)
    listed = _listed(folder)
    names = tuple(listed["class_names"])
    train, test = ([_open(folder, entry, len(names)) for entry in listed[split]] for split in ("train", "test"))
    encodings = {shard.encoding for shard in (*train, *test)}
    if len(encodings) > 1:
        raise UserError(f"{folder} has shards of several encodings ({', '.join(sorted(encodings))}): pack it again")
    data = PackedData(names, _samples(train), _samples(test), recipe.image_size, recipe.seed, device, workers)
    data.left_out = [(Path(name), reason) for name, reason in listed["left_out"]]
    data.side = listed["side"]
    return data


class PackedData(StoredData[Place]):
    """A data set of packed images.

    Attributes:
        left_out: broken files that were left out when it was packed, each with the reason.
        side: pixels of an image's shorter side; images that had fewer have as many as they had.
    """

    left_out: list[Broken]
    side: int

    @property
    def notes(self) -> list[str]:
        """Sentences for the user."""
        wanted = self.preprocessing.resize
        if self.side >= wanted:
            return []
        return [
            f"the packed images have {self.side} pixels at their shorter side, and test images are enlarged to {wanted}:"
            f" --side {wanted} packs them larger"
        ]

    def _whole(self, source: Place) -> Image.Image:
        shard, row = source
        return shard.whole(row)

    def _part(self, source: Place, box_of: BoxOf) -> Tensor:
        shard, row = source
        return shard.part(row, box_of, self.image_size)


def _listed(folder: Path) -> dict[str, Any]:
    path = folder / PACKED
    if not path.is_file():
        raise UserError(f"{folder} is no packed data set: it has no {PACKED}; biasloss data pack writes one")
    try:
        listed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if listed["format"] != FORMAT:
            raise ValueError(f"its format is {listed['format']!r}, expected {FORMAT!r}")
        for name, kind in {"class_names": list, "train": list, "test": list, "left_out": list, "side": int}.items():
            if not isinstance(listed[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
    except KeyError as error:
        raise UserError(f"{path} is broken: it lacks {error}; pack the images again") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is broken: {error}; pack the images again") from None
    return listed


def _open(folder: Path, entry: Any, classes: int) -> Shard:
    try:
        name, images = str(entry["file"]), int(entry["images"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / PACKED} is broken: {entry} is no shard; pack the images again") from None
    return Shard(folder / name, images, classes)


def _samples(shards: list[Shard]) -> list[tuple[Place, int]]:
    return [((shard, row), number) for shard in shards for row, number in enumerate(shard.classes)]
