"""Image data sets too large for memory: every image is read when a batch needs it, in worker processes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.augmentation import Augmentation, Key
from biasloss_ext.recipes.data.images import Box, BoxOf, Preprocessing, pixels_of
from biasloss_ext.recipes.order import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN = 0.875  # of the shorter side of a test image, what the model sees
_ERROR = f"{UserError.__module__}.{UserError.__qualname__}"
_SCALES, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)

Source = TypeVar("Source")


class StoredData(ABC, Generic[Source]):
    """Training and test images that lie in files; see :class:`biasloss_ext.recipes.data.base.Data`.

    Training images are cropped at a random place and scale to ``image_size`` and mirrored; of test images the middle is
    taken, 87.5% of the shorter side. Both are normalized with ImageNet's mean and deviation.

    Args:
        train, test: where each image is, and its class.
    """

    channels = 3

    def __init__(
        self,
        class_names: tuple[str, ...],
        train: list[tuple[Source, int]],
        test: list[tuple[Source, int]],
        image_size: int,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.augmentation: Augmentation | None = None
        self.class_names, self.classes = class_names, len(class_names)
        self.image_size = image_size
        self.preprocessing = Preprocessing(image_size, round(image_size / MARGIN), MEAN, STD)
        self._train, self._test = train, test
        self._seed, self._device, self._workers = seed, device, workers

    @property
    def train_images(self) -> int:
        return len(self._train)

    @property
    def train_classes(self) -> Tensor:
        return torch.tensor([number for _, number in self._train])

    @property
    def test_images(self) -> int:
        return len(self._test)

    def keep(self, indices: Tensor, classes: Tensor) -> None:
        """Goes on with these training images alone, and with these classes for them."""
        pairs = zip(indices.tolist(), classes.tolist(), strict=True)
        self._train = [(self._train[index][0], number) for index, number in pairs]

    def train_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(self._train, self._augmented, epoch, batches)

    def test_batches(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(self._test, self._plain, 0, batches)

    @abstractmethod
    def _whole(self, source: Source) -> Image.Image:
        """An image as RGB, upright."""

    @abstractmethod
    def _part(self, source: Source, box_of: BoxOf) -> Tensor:
        """A part of it, resized to a square of ``image_size``: uint8 (3, image_size, image_size)."""

    def _augmented(self, source: Source, key: Key) -> Tensor:
        generator = seeded(*key, 1)
        pixels = self._part(source, lambda width, height: random_crop(width, height, generator))
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(2)
        if self.augmentation is None:
            return pixels
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        changed = pixels_of(self.augmentation.of_pixels(image, key))
        return self.augmentation.of_normalized(self.preprocessing.normalized(changed), key)

    def _plain(self, source: Source, key: Key) -> Tensor:
        return pixels_of(self.preprocessing.fitted(self._whole(source)))

    def _load(
        self, samples: list[tuple[Source, int]], prepare: Prepare[Source], epoch: int, batches: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Images(samples, prepare),
            batch_sampler=[[(self._seed, epoch, index) for index in batch.tolist()] for batch in batches],
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Without a generator of its own the loader would draw from the random state that a checkpoint holds.
            generator=torch.Generator(),
        )
        try:
            for batch, classes in loader:
                images = batch.to(self._device, non_blocking=True)
                if images.dtype == torch.uint8:  # a quarter of the bytes up to here
                    images = self.preprocessing.normalized(images)
                yield images, classes.to(self._device, non_blocking=True)
        except UserError as error:
            # From a worker process it comes with that process's whole traceback; the last line is the sentence.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix(f"{_ERROR}: ")) from None


Prepare = Callable[[Source, Key], Tensor]  # uint8, or float32 if it is normalized


class _Images(Dataset[tuple[Tensor, int]], Generic[Source]):
    """Gives every image its own random numbers, whichever worker process loads it and in whichever order."""

    def __init__(self, samples: list[tuple[Source, int]], prepare: Prepare[Source]) -> None:
        self._samples, self._prepare = samples, prepare

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        source, number = self._samples[key[2]]
        return self._prepare(source, key), number


def random_crop(width: int, height: int, generator: torch.Generator) -> Box:
    """A box of random place, area and ratio, as in ``torchvision.transforms.RandomResizedCrop``."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def below(count: int) -> int:
        """In proportion, so that it is the same place whatever size the image was packed in."""
        return int(count * float(torch.rand((), generator=generator)))

    for _ in range(10):
        area = width * height * between(*_SCALES)
        ratio = math.exp(between(*(math.log(bound) for bound in _RATIOS)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = below(width - w + 1), below(height - h + 1)
            return left, top, left + w, top + h
    # The middle, of a ratio that is allowed.
    w = max(1, min(width, round(height * _RATIOS[1])))
    h = max(1, min(height, round(width / _RATIOS[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
