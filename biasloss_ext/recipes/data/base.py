"""What training wants of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor


class Data(Protocol):
    """Training and test images as normalised float32 batches (n, channels, size, size) with int64 classes (n,).

    Augmentation is a function of the seed, the epoch and the image: neither the batch nor the process matters.
    """

    classes: int
    channels: int
    image_size: int
    train_images: int
    test_images: int

    def train_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Augmented training images, for every int64 tensor of indices."""

    def test_batches(self, batches: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Test images as they are, for every int64 tensor of indices."""
