"""Images in folders, one for each class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.augmentation import Augmentation, Key
from biasloss_ext.recipes.data.base import data_folder
from biasloss_ext.recipes.data.images import (
    Box,
    Broken,
    Preprocessing,
    Watch,
    broken_files,
    image_files,
    pixels_of,
    read_crop,
    read_image,
)
from biasloss_ext.recipes.order import seeded
from biasloss_ext.recipes.recipe import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_FOLDERS = ("val", "test")
_ERROR = f"{UserError.__module__}.{UserError.__qualname__}"
_SCALES, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)

Sample = tuple[Path, int]


def load_folder(recipe: Recipe, device: torch.device, workers: int) -> FolderData:
    """DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (or DIR/test).

    Training images are cropped at a random place and scale to the image size and mirrored; of test images the middle is
    taken, 87.5% of the shorter side. Both are normalized with ImageNet's mean and deviation. Hidden files and folders
    are left out.

    Raises:
        UserError: a folder is missing or empty, the classes differ, or there are fewer than two.
    """
    folder = data_folder(recipe)
    test = next((name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        raise UserError(
            f"{folder} is no image folder: expected {folder}/train/CLASS/IMAGE and {folder}/val/CLASS/IMAGE"
            " (or test for val)"
        )
    classes, test_classes = (_classes(folder / name) for name in ("train", test))
    if classes != test_classes:
        differing = sorted(set(classes) ^ set(test_classes))
        raise UserError(f"the classes of {folder / 'train'} and {folder / test} differ: {', '.join(differing[:5])}")
    if len(classes) < 2:
        found = f"one class, {classes[0]}" if classes else "no class"
        raise UserError(
            f"{folder / 'train'} has {found}: a classifier needs two or more, each a folder with its images"
        )
    return FolderData(
        classes,
        _samples(folder / "train", classes),
        _samples(folder / test, classes),
        recipe.image_size,
        recipe.seed,
        device,
        workers,
    )


class FolderData:
    """A data set read from files as it is used; see :class:`biasloss_ext.recipes.data.base.Data`."""

    channels = 3

    def __init__(
        self,
        class_names: tuple[str, ...],
        train: list[Sample],
        test: list[Sample],
        image_size: int,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.augmentation: Augmentation | None = None
        self.class_names, self.classes = class_names, len(class_names)
        self.image_size = image_size
        self.preprocessing = Preprocessing(image_size, round(image_size / 0.875), MEAN, STD)
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

    @property
    def listing(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and time of every file, by which it is known to be the same."""
        states = ((path, path.stat()) for path, _ in (*self._train, *self._test) if path.exists())
        return tuple((str(path), state.st_size, state.st_mtime_ns) for path, state in states)

    def broken(self, part: int = 0, parts: int = 1, watch: Watch | None = None) -> list[Broken]:
        """The files that cannot be read, each with the reason: of every ``parts``-th file, from ``part`` on.

        Args:
            watch: as for :func:`biasloss_ext.recipes.data.images.broken_files`.
        """
        paths = [path for path, _ in (*self._train, *self._test)][part::parts]
        return broken_files(paths, self._workers, watch)

    def leave_out(self, paths: set[Path]) -> None:
        """Goes on without these files.

        Raises:
            UserError: no image of a class is left.
        """
        for name in ("_train", "_test"):
            samples = getattr(self, name)
            kept = [sample for sample in samples if sample[0] not in paths]
            empty = {number for _, number in samples} - {number for _, number in kept}
            if empty:
                raise UserError(f"all images of the class {self.class_names[min(empty)]} are broken")
            setattr(self, name, kept)

    def keep(self, indices: Tensor, classes: Tensor) -> None:
        """Goes on with these training images alone, and with these classes for them."""
        pairs = zip(indices.tolist(), classes.tolist(), strict=True)
        self._train = [(self._train[index][0], number) for index, number in pairs]

    def train_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(self._train, self._augmented, epoch, batches)

    def test_batches(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(self._test, self._plain, 0, batches)

    def _augmented(self, path: Path, key: Key) -> Tensor:
        generator = seeded(*key, 1)
        resized = read_crop(path, lambda width, height: _random_crop(width, height, generator), self.image_size)
        if torch.rand((), generator=generator) < 0.5:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augmentation is None:
            return pixels_of(resized)
        changed = pixels_of(self.augmentation.of_pixels(resized, key))
        return self.augmentation.of_normalized(self.preprocessing.normalized(changed), key)

    def _plain(self, path: Path, key: Key) -> Tensor:
        return pixels_of(self.preprocessing.fitted(read_image(path)))

    def _load(
        self, samples: list[Sample], prepare: Prepare, epoch: int, batches: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Files(samples, prepare),
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


Prepare = Callable[[Path, Key], Tensor]  # uint8, or float32 if it is normalized


class _Files(Dataset[tuple[Tensor, int]]):
    """Gives every image its own random numbers, whichever worker process loads it and in whichever order."""

    def __init__(self, samples: list[Sample], prepare: Prepare) -> None:
        self._samples, self._prepare = samples, prepare

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        path, number = self._samples[key[2]]
        return self._prepare(path, key), number


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _samples(folder: Path, classes: Sequence[str]) -> list[Sample]:
    samples: list[Sample] = []
    for number, name in enumerate(classes):
        files = image_files(folder / name)
        if not files:
            raise UserError(f"there is no image in {folder / name}: every class needs some, as .jpg, .png or the like")
        samples += [(path, number) for path in files]
    return samples


def _random_crop(width: int, height: int, generator: torch.Generator) -> Box:
    """A box of random place, area and ratio, as in ``torchvision.transforms.RandomResizedCrop``."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

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
