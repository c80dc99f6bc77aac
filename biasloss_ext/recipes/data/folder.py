"""Images in folders, one for each class, through torchvision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.optional import torchvision
from biasloss_ext.recipes.order import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_FOLDERS = ("val", "test")
_ERROR = f"{UserError.__module__}.{UserError.__qualname__}"


def load_folder(data_dir: str, image_size: int, seed: int, device: torch.device, workers: int) -> FolderData:
    """DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (or DIR/test).

    Training images are cropped at a random place and scale to ``image_size`` and mirrored; of test images the middle is
    taken, 87.5% of the shorter side. Both are normalised with ImageNet's mean and deviation.

    Raises:
        UserError: torchvision cannot be imported, a folder is missing or empty, or the classes differ.
    """
    folder = Path(data_dir)
    test = next((name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        raise UserError(
            f"{data_dir} is no image folder: expected {data_dir}/train/CLASS/IMAGE and {data_dir}/val/CLASS/IMAGE"
            " (or test for val)"
        )
    vision = torchvision("imagefolder")
    v2 = vision.transforms.v2
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augmented = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip(), *to_float])
    whole = round(image_size / 0.875)
    plain = v2.Compose([v2.Resize(whole, antialias=True), v2.CenterCrop(image_size), *to_float])
    try:
        train_set = vision.datasets.ImageFolder(folder / "train", augmented)
        test_set = vision.datasets.ImageFolder(folder / test, plain)
    except FileNotFoundError as error:
        raise UserError(f"{data_dir} is no image folder: {str(error).splitlines()[0]}") from None
    if train_set.classes != test_set.classes:
        differing = sorted(set(train_set.classes) ^ set(test_set.classes))
        raise UserError(f"the classes of {folder / 'train'} and {folder / test} differ: {', '.join(differing[:5])}")
    return FolderData(train_set, test_set, image_size, seed, device, workers)


class FolderData:
    """A data set read from files as it is used; see :class:`biasloss_ext.recipes.data.base.Data`."""

    channels = 3

    def __init__(
        self, train_set: Any, test_set: Any, image_size: int, seed: int, device: torch.device, workers: int
    ) -> None:
        self.classes = len(train_set.classes)
        self.image_size = image_size
        self.train_images, self.test_images = len(train_set), len(test_set)
        self._train, self._test = _Seeded(train_set), _Seeded(test_set)
        self._seed, self._device, self._workers = seed, device, workers

    def train_batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(self._train, epoch, batches)

    def test_batches(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(self._test, 0, batches)

    def _load(self, images: _Seeded, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            images,
            batch_sampler=[[(self._seed, epoch, index) for index in batch.tolist()] for batch in batches],
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Without a generator of its own the loader would draw from the random state that a checkpoint holds.
            generator=torch.Generator(),
        )
        try:
            for batch, classes in loader:
                yield batch.to(self._device, non_blocking=True), classes.to(self._device, non_blocking=True)
        except UserError as error:
            # From a worker process it comes with that process's whole traceback; the last line is the sentence.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix(f"{_ERROR}: ")) from None


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Gives every image its own random numbers, whichever worker process loads it and in whichever order."""

    def __init__(self, images: Any) -> None:
        self._images = images

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(seeded(*key, 1).get_state())
            try:
                return self._images[key[2]]  # type: ignore[no-any-return]
            except (OSError, SyntaxError) as error:  # the latter is what Pillow raises for a broken PNG
                path = self._images.samples[key[2]][0]
                raise UserError(f"cannot read the image {path}: {str(error).splitlines()[0]}") from None
