"""The interface between training and data sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.augmentation import Augmentation
from biasloss_ext.recipes.data.images import Preprocessing
from biasloss_ext.recipes.recipe import Recipe


class Data(Protocol):
    """Training and test images as normalized float32 batches (n, channels, size, size) with int64 classes (n,).

    Augmentation is a function of the seed, the epoch and the image: neither the batch nor the process matters.
    """

    classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    preprocessing: Preprocessing  # of the test images, for images of whatever size
    augmentation: Augmentation | None  # of the training images, in addition to the data set's own

    @property
    def train_images(self) -> int:
        """How many there are to train on."""

    @property
    def train_classes(self) -> Tensor:
        """Their classes (n,), int64, on the CPU."""

    @property
    def test_images(self) -> int:
        """How many there are."""

    def keep(self, indices: Tensor, classes: Tensor) -> None:
        """Goes on with these training images alone, and with these classes for them."""

    def train_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Augmented training images, for every int64 tensor of indices."""

    def test_batches(self, batches: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Test images as they are, for every int64 tensor of indices."""


def data_folder(recipe: Recipe, image_size: int | None = None) -> Path:
    """The folder where the data are, of images that are of ``image_size`` and no other where that is given.

    Raises:
        UserError: the recipe has no folder, or asks for another size.
    """
    if recipe.data_dir is None:
        raise UserError(f"{recipe.data} needs --data-dir, the folder where the data are")
    if image_size is not None and recipe.image_size != image_size:
        raise UserError(
            f"the images of {recipe.data} are {image_size} x {image_size}: leave --image-size out, got {recipe.image_size}"
        )
    return Path(recipe.data_dir)
