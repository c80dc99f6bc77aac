"""CIFAR-10 and CIFAR-100 from the published python files."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import data_folder
from biasloss_ext.recipes.data.images import Preprocessing
from biasloss_ext.recipes.data.in_memory import InMemoryData
from biasloss_ext.recipes.recipe import Recipe


@dataclass(frozen=True)
class _Format:
    title: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""
_FORMATS = {
    "cifar10": _Format(
        "CIFAR-10",
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "labels",
        tuple(_CIFAR10.split()),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _Format(
        "CIFAR-100",
        "cifar-100-python",
        ("train",),
        ("test",),
        "fine_labels",
        tuple(_CIFAR100.split()),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}


def load_cifar(recipe: Recipe, device: torch.device, workers: int) -> InMemoryData:
    """ "cifar10" or "cifar100": padded by 4, cropped and mirrored in training.

    The folder is the one that the published archive unpacks to, or the one that holds it.

    Raises:
        UserError: the files are not there, or not in the published format.
    """
    expected = _FORMATS[recipe.data]
    folder = data_folder(recipe, image_size=32)
    if (folder / expected.folder).is_dir():
        folder = folder / expected.folder
    missing = [file for file in expected.train + expected.test if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"no {expected.title} in {recipe.data_dir}: {', '.join(missing)} missing; expected the files of the published"
            f" python version, {', '.join(expected.train + expected.test)}, there or in its folder {expected.folder}"
        )
    return InMemoryData(
        _read(folder, expected.train, expected),
        _read(folder, expected.test, expected),
        class_names=expected.class_names,
        preprocessing=Preprocessing(32, 32, expected.mean, expected.std),
        padding=4,
        flip=True,
        seed=recipe.seed,
        device=device,
    )


def _read(folder: Path, files: tuple[str, ...], expected: _Format) -> tuple[Tensor, Tensor]:
    parts = [_read_file(folder / file, expected) for file in files]
    return torch.cat([images for images, _ in parts]), torch.cat([classes for _, classes in parts])


def _read_file(path: Path, expected: _Format) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        data = np.asarray(content[b"data"])
        labels = np.asarray(content[expected.labels.encode()], dtype=np.int64)
    except Exception as error:  # a broken pickle can raise anything
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a file of {expected.title}'s published python version: {cause}") from None
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32 or len(data) == 0:
        raise UserError(f"{path} should hold images as uint8 rows of 3 x 32 x 32 = 3072, has {data.dtype} {data.shape}")
    if labels.shape != (len(data),) or labels.min() < 0 or labels.max() >= len(expected.class_names):
        raise UserError(
            f"{path} should hold one class from 0 to {len(expected.class_names) - 1} for each of its {len(data)} images"
        )
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels)


class _ArraysOnly(pickle.Unpickler):
    """Read the objects of CIFAR's files. A pickle can name any function to be called; these are refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]  # that function, under whatever name this numpy keeps it
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
