"""What training wants of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from biasloss_ext.recipes.data.augmentation import Augmentation
from biasloss_ext.recipes.data.images import Preprocessing


class Data(Protocol):
    """Training and test images as normalized float32 batches (n, channels, size, size) with int64 classes (n,).

    Augmentation is a function of the seed, the epoch and the image: neither the batch nor the process matters.
    """

    classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    preprocessing: Preprocessing  # of the test images, for images of whatever size
    augmentation: Augmentation | None  # of the training images, beside the data set's own

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
