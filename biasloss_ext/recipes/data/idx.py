"""MNIST, Fashion-MNIST, KMNIST and EMNIST from their published IDX files, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import data_folder
from biasloss_ext.recipes.data.images import Preprocessing
from biasloss_ext.recipes.data.in_memory import InMemoryData
from biasloss_ext.recipes.recipe import Recipe

IMAGE_SIZE = 28  # in the files
PADDED_SIZE = 32
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_UNSIGNED_BYTES = 8  # the type in an IDX header

_DIGITS = tuple("0123456789")
_CAPITALS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SMALL = tuple("abcdefghijklmnopqrstuvwxyz")
_MERGED = (*_DIGITS, *_CAPITALS, *"abdefghnqrt")  # small letters that look unlike their capitals
FASHION_CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class _Format:
    """How a data set is published.

    Attributes:
        prefixes: what the names of the training files and of the test files begin with.
        mean, deviation: of the training images once they are padded, as numbers in [0, 1].
        first_label: the label of the first class.
        transposed: rows and columns of the images are exchanged.
        flip: a mirrored image is of the same class.
    """

    title: str
    class_names: tuple[str, ...]
    mean: float
    deviation: float
    prefixes: tuple[str, str] = ("train-", "t10k-")
    first_label: int = 0
    transposed: bool = False
    flip: bool = False


def _emnist(split: str, class_names: tuple[str, ...], first_label: int = 0) -> _Format:
    prefixes = (f"emnist-{split}-train-", f"emnist-{split}-test-")
    return _Format(f"EMNIST {split}", class_names, 0.133, 0.300, prefixes, first_label, transposed=True)


_FORMATS = {
    "mnist": _Format("MNIST", _DIGITS, 0.100, 0.275),
    "fashion_mnist": _Format("Fashion-MNIST", FASHION_CLASSES, 0.219, 0.332, flip=True),
    "kmnist": _Format("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"), 0.147, 0.315),
    "emnist_balanced": _emnist("balanced", _MERGED),
    "emnist_byclass": _emnist("byclass", (*_DIGITS, *_CAPITALS, *_SMALL)),
    "emnist_bymerge": _emnist("bymerge", _MERGED),
    "emnist_digits": _emnist("digits", _DIGITS),
    "emnist_letters": _emnist("letters", _SMALL, first_label=1),
    "emnist_mnist": _emnist("mnist", _DIGITS),
}

_SAME_FILES = ("mnist", "fashion_mnist", "kmnist")  # data sets whose files have the same names


def load_idx(recipe: Recipe, device: torch.device, workers: int) -> InMemoryData:
    """A data set in IDX files, padded from 28 x 28 to 32 x 32, the gray value in all three channels.

    Training images are shifted by up to 2 pixels; those of Fashion-MNIST are mirrored too. The folder is that of the four
    files, or one above it.

    Raises:
        UserError: the files are missing, in several folders, broken, or do not belong together.
    """
    published, folder = _FORMATS[recipe.data], data_folder(recipe, image_size=PADDED_SIZE)
    train, test = (_read_pair(*pair, published) for pair in _find(recipe.data, folder))
    return InMemoryData(
        train,
        test,
        class_names=published.class_names,
        preprocessing=Preprocessing(
            PADDED_SIZE, IMAGE_SIZE, (published.mean,) * 3, (published.deviation,) * 3, gray=True
        ),
        padding=2,
        flip=published.flip,
        seed=recipe.seed,
        device=device,
    )


def _find(name: str, data_dir: Path) -> list[tuple[Path, Path]]:
    """The images and labels for training, and those for the test."""
    published = _FORMATS[name]
    wanted = [prefix + kind for prefix in published.prefixes for kind in (_IMAGES, _LABELS)]
    others = {_letters(other) for other in _SAME_FILES if other != name} if name in _SAME_FILES else set()
    found: dict[Path, list[Path]] = {}
    lacking: list[str] = wanted  # in the folder that has most of the files
    for parent, folders, files in os.walk(data_dir, followlinks=True):
        # The folder of another data set with the same file names is not looked into.
        folders[:] = sorted(f for f in folders if not f.startswith(".") and _letters(f) not in others)
        paths = {kind: Path(parent, file) for kind in wanted for file in (f"{kind}.gz", kind) if file in files}
        missing = [kind for kind in wanted if kind not in paths]
        lacking = min(lacking, missing, key=len)
        if not missing:
            found[Path(parent)] = [paths[kind] for kind in wanted]
    if not found:
        missing_some = f"; {', '.join(lacking)} missing" if len(lacking) < len(wanted) else ""
        raise UserError(
            f"no {published.title} in {data_dir}: expected {', '.join(wanted)}, plain or as .gz, there or in a folder"
            f" below{missing_some}"
        )
    if len(found) > 1 and data_dir not in found:
        listed = ", ".join(map(str, found))
        raise UserError(
            f"several folders below {data_dir} have files of {published.title}: --data-dir must be one of {listed}"
        )
    images, labels, test_images, test_labels = found[data_dir] if data_dir in found else next(iter(found.values()))
    return [(images, labels), (test_images, test_labels)]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _read_pair(images_path: Path, labels_path: Path, published: _Format) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 32, 32), uint8, and classes (n,), int64."""
    images, labels = _read(images_path, 3), _read(labels_path, 1)
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        size = " x ".join(map(str, images.shape[1:]))
        raise UserError(f"{images_path} should have images of {IMAGE_SIZE} x {IMAGE_SIZE}, has {size}")
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(
            f"{images_path} and {labels_path} should have one label for each image, have {len(images)} images and"
            f" {len(labels)} labels"
        )
    first, count = published.first_label, len(published.class_names)
    if labels.min() < first or labels.max() >= first + count:
        raise UserError(
            f"{labels_path} should have labels from {first} to {first + count - 1}, has {labels.min()} to {labels.max()}"
        )
    if published.transposed:
        images = images.swapaxes(1, 2)
    margin = (PADDED_SIZE - IMAGE_SIZE) // 2
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    return torch.from_numpy(padded).unsqueeze(1), torch.from_numpy(labels.astype(np.int64) - first)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, the type, the number of dimensions, each one's size, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {path}: {cause}") from None
    expected = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    if content[:4] != expected:
        raise UserError(
            f"{path} is not an IDX file of {dimensions}-dimensional unsigned bytes: it should begin with"
            f" {expected.hex(' ')}, begins with {content[:4].hex(' ') or 'nothing'}"
        )
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:header].ljust(4 * dimensions, b"\0"), ">u4").tolist())
    if len(content) != header + math.prod(shape):
        raise UserError(
            f"{path} should have {header + math.prod(shape)} bytes for {' x '.join(map(str, shape))} values, has"
            f" {len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
