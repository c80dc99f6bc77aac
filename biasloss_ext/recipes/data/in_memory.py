"""Data sets that fit into memory: small images, cropped and flipped as whole batches on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.recipes.data.augmentation import Augmentation
from biasloss_ext.recipes.data.images import Preprocessing
from biasloss_ext.recipes.order import seeded


class InMemoryData:
    """A data set held on the device as uint8; see :class:`biasloss_ext.recipes.data.base.Data`.

    Args:
        train, test: pairs of images (n, channels, size, size), uint8, and classes (n,), int64. Of gray images one channel
            is enough: batches have as many as the mean.
        class_names: one for each class, in the order of their numbers.
        preprocessing: what makes any image one of the test images; its mean and deviation are those of the data.
        padding: training images are padded by so many black pixels and cropped at a random place.
        flip: half of the training images are mirrored.
        seed: of the augmentation.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        class_names: tuple[str, ...],
        preprocessing: Preprocessing,
        padding: int,
        flip: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self.augmentation: Augmentation | None = None
        self.class_names, self.classes, self.preprocessing = class_names, len(class_names), preprocessing
        self.test_images = len(test[0])
        self.channels, self.image_size = len(preprocessing.mean), train[0].shape[3]
        self._padding, self._flip, self._seed = padding, flip, seed
        self._padded = F.pad(train[0], (padding,) * 4).to(device)
        self._train_classes = train[1].to(device)
        self._test, self._test_classes = test[0].to(device), test[1].to(device)
        self._scale = 255 * torch.tensor(preprocessing.deviation, device=device).view(-1, 1, 1)
        self._shift = 255 * torch.tensor(preprocessing.mean, device=device).view(-1, 1, 1)

    @property
    def train_images(self) -> int:
        return len(self._train_classes)

    @property
    def train_classes(self) -> Tensor:
        return self._train_classes.cpu()

    def keep(self, indices: Tensor, classes: Tensor) -> None:
        """Goes on with these training images alone, and with these classes for them."""
        self._padded, self._train_classes = self._padded[indices], classes.to(self._train_classes.device)

    def train_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        draws = torch.rand(self.train_images, 3, generator=seeded(self._seed, epoch, 1))
        places = (draws[:, :2] * (2 * self._padding + 1)).long()
        mirrored = (draws[:, 2] < 0.5) & self._flip
        device = self._padded.device
        for indices in batches:
            images = self._crop(indices.to(device), places[indices].to(device), mirrored[indices].to(device))
            yield self._augmented(images, epoch, indices), self._train_classes[indices.to(device)]

    def test_batches(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            chosen = indices.to(self._test.device)
            yield self._normalized(self._test[chosen]), self._test_classes[chosen]

    def _crop(self, indices: Tensor, places: Tensor, mirrored: Tensor) -> Tensor:
        along = torch.arange(self.image_size, device=indices.device)
        rows = places[:, 0, None] + along
        columns = places[:, 1, None] + torch.where(mirrored[:, None], along.flip(0), along)
        channels = torch.arange(self._padded.shape[1], device=indices.device)
        return self._padded[
            indices[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]

    def _augmented(self, images: Tensor, epoch: int, indices: Tensor) -> Tensor:
        """Cropped images (n, channels, size, size), uint8, to what the model takes."""
        augmentation = self.augmentation
        if augmentation is None:
            return self._normalized(images)
        keys = [(self._seed, epoch, index) for index in indices.tolist()]
        changed = [augmentation.of_pixels(image, key) for image, key in zip(images, keys, strict=True)]
        normalized = self._normalized(torch.stack(changed))
        return torch.stack(
            [augmentation.of_normalized(image, key) for image, key in zip(normalized, keys, strict=True)]
        )

    def _normalized(self, images: Tensor) -> Tensor:
        return (images - self._shift) / self._scale
