"""Images in folders, one for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import data_folder
from biasloss_ext.recipes.data.images import (
    BoxOf,
    Broken,
    Watch,
    broken_files,
    image_files,
    pixels_of,
    read_crop,
    read_image,
)
from biasloss_ext.recipes.data.stored import StoredData
from biasloss_ext.recipes.recipe import Recipe

TEST_FOLDERS = ("val", "test")
PACKED = "packed.json"  # in a folder that `biasloss data pack` wrote

Sample = tuple[Path, int]


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a data set.

    Attributes:
        class_names: in the order of their numbers.
        train, test: every file with the number of its class.
        test_name: of the folder of test images.
    """

    class_names: tuple[str, ...]
    train: list[Sample]
    test: list[Sample]
    test_name: str


def find_images(folder: Path) -> ImageFolder:
    """DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (or DIR/test), without hidden files and folders.

    Raises:
        UserError: a folder is missing or empty, the classes differ, or there are fewer than two.
    """
    test = next((name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        if (folder / PACKED).exists():
            raise UserError(f"{folder} is a packed data set: give it to --data packed")
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
    return ImageFolder(classes, _samples(folder / "train", classes), _samples(folder / test, classes), test)


def load_folder(recipe: Recipe, device: torch.device, workers: int) -> FolderData:
    """The data set of the image files in a folder; raises as :func:`find_images`."""
    found = find_images(data_folder(recipe))
    return FolderData(found.class_names, found.train, found.test, recipe.image_size, recipe.seed, device, workers)


class FolderData(StoredData[Path]):
    """A data set of image files."""

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
        self._train, self._test = (without(samples, paths, self.class_names) for samples in (self._train, self._test))

    def _whole(self, source: Path) -> Image.Image:
        return read_image(source)

    def _part(self, source: Path, box_of: BoxOf) -> Tensor:
        return pixels_of(read_crop(source, box_of, self.image_size))


def without(samples: list[Sample], paths: set[Path], class_names: Sequence[str]) -> list[Sample]:
    """The samples but those of broken files.

    Raises:
        UserError: no image of a class is left.
    """
    kept = [sample for sample in samples if sample[0] not in paths]
    empty = {number for _, number in samples} - {number for _, number in kept}
    if empty:
        raise UserError(f"all images of the class {class_names[min(empty)]} are broken")
    return kept


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
