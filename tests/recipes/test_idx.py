"""MNIST's family of data sets, from IDX files written here."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data import load_data
from biasloss_ext.recipes.data.base import Data
from biasloss_ext.recipes.recipe import EMNIST_SPLITS, make_recipe
from tests.recipes.idx_files import EMNIST_PARTS, FILES, idx, write_idx
from tests.recipes.tiny import Fails, checkpoint_of, run, use_linear_model

EMNIST_CLASSES = {"balanced": 47, "byclass": 62, "bymerge": 47, "digits": 10, "letters": 26, "mnist": 10}


def emnist_files(split: str) -> tuple[str, ...]:
    return tuple(f"emnist-{split}-{part}-ubyte" for part in EMNIST_PARTS)


def load(name: str, folder: Path) -> Data:
    return load_data(make_recipe(name, data_dir=str(folder)), torch.device("cpu"))


def pixels(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """All test images as numbers from 0 to 255, and their classes."""
    images, classes = next(iter(data.test_batches([torch.arange(data.test_images)])))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (data.preprocessing.mean, data.preprocessing.deviation))
    return 255 * (images * deviation + mean), classes


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_images_are_padded_and_gray(tmp_path: Path, name: str, compressed: bool) -> None:
    written = write_idx(tmp_path, compressed=compressed)
    data = load(name, tmp_path)
    assert (data.train_images, data.test_images, data.channels, data.image_size) == (80, 16, 3, 32)
    images, classes = pixels(data)
    expected = np.pad(written[FILES[2]], ((0, 0), (2, 2), (2, 2)))
    for channel in range(3):
        torch.testing.assert_close(images[:, channel], torch.from_numpy(expected).float(), atol=1e-3, rtol=0)
    assert classes.tolist() == written[FILES[3]].tolist()
    assert len(data.class_names) == 10


@pytest.mark.parametrize("split", EMNIST_SPLITS)
def test_splits_of_emnist_lie_in_one_folder_and_are_turned(tmp_path: Path, split: str) -> None:
    for other in EMNIST_SPLITS:
        count, first = EMNIST_CLASSES[other], int(other == "letters")
        written = write_idx(
            tmp_path / "EMNIST" / "gzip", emnist_files(other), count, count, count, first, compressed=True
        )
        if other == split:
            expected = written[emnist_files(split)[2]]
    data = load(f"emnist_{split}", tmp_path)
    assert data.train_images == data.classes == len(set(data.class_names)) == EMNIST_CLASSES[split]
    images, classes = pixels(data)
    assert classes.tolist() == list(range(EMNIST_CLASSES[split]))
    turned = torch.from_numpy(expected.transpose(0, 2, 1).copy()).float()
    torch.testing.assert_close(images[:, 0, 2:-2, 2:-2], turned, atol=1e-3, rtol=0)


def test_only_fashion_is_mirrored(tmp_path: Path) -> None:
    half = np.zeros((20, 28, 28), np.uint8)
    half[:, :, :14] = 255
    write_idx(tmp_path, train_images=20)
    (tmp_path / FILES[0]).write_bytes(idx(half))
    for name, mirrored in (("mnist", False), ("fashion_mnist", True)):
        data = load(name, tmp_path)
        images, _ = next(iter(data.train_batches(0, [torch.arange(20)])))
        right = (images[:, 0, :, :16].sum((1, 2)) < images[:, 0, :, 16:].sum((1, 2))).sum()
        assert (0 < right < 20) if mirrored else right == 0


def test_a_file_is_prepared_as_the_test_images(tmp_path: Path) -> None:
    written = write_idx(tmp_path)
    Image.fromarray(written[FILES[2]][3]).save(tmp_path / "three.png")
    data = load("mnist", tmp_path)
    test, _ = next(iter(data.test_batches([torch.tensor([3])])))
    torch.testing.assert_close(data.preprocessing.read(tmp_path / "three.png"), test[0])


def test_files_are_found_below_and_not_in_the_folder_of_another_data_set(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw", train_images=30)
    with pytest.raises(UserError, match=r"no Fashion-MNIST in .*: expected train-images-idx3-ubyte, "):
        load("fashion_mnist", tmp_path)
    write_idx(tmp_path / "FashionMNIST" / "raw", train_images=40, compressed=True)
    assert load("mnist", tmp_path).train_images == 30
    assert load("fashion_mnist", tmp_path).train_images == 40
    assert load("fashion_mnist", tmp_path / "MNIST").train_images == 30  # named by the user
    write_idx(tmp_path / "fashion-mnist-2", train_images=50)
    with pytest.raises(UserError, match=r"several folders below .*FashionMNIST/raw, .*fashion-mnist-2"):
        load("fashion_mnist", tmp_path)
    assert load("fashion_mnist", tmp_path / "fashion-mnist-2").train_images == 50


def test_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_linear_model(monkeypatch)
    write_idx(tmp_path / "data")
    outcome = run(tmp_path / "data", tmp_path / "out", data="fashion_mnist", epochs=1)
    assert outcome.test_images == 16
    assert checkpoint_of(tmp_path / "out")["data"]["class_names"][-1] == "ankle boot"


IMAGES, LABELS = "data/train-images-idx3-ubyte", "data/train-labels-idx1-ubyte"
FAULTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": (LABELS, None, "there or in a folder below; train-labels-idx1-ubyte missing"),
    "empty": (IMAGES, b"", "it should begin with 00 00 08 03, begins with nothing"),
    "of another kind": (IMAGES, idx(np.zeros(80)), "it should begin with 00 00 08 03, begins with 00 00 08 01"),
    "text": (LABELS, b"no labels", f"{LABELS} is not an IDX file of 1-dimensional unsigned bytes: "),
    "a header alone": (IMAGES, idx(np.zeros((80, 28, 28)))[:10], f"{IMAGES} should have "),
    "short": (IMAGES, idx(np.zeros((80, 28, 28)))[:-1], "should have 62736 bytes for 80 x 28 x 28 values, has 62735"),
    "long": (LABELS, idx(np.zeros(80)) + b"0", "should have 88 bytes for 80 values, has 89"),
    "of another size": (IMAGES, idx(np.zeros((80, 32, 32))), "should have images of 28 x 28, has 32 x 32"),
    "labels too few": (LABELS, idx(np.zeros(79)), "one label for each image, have 80 images and 79 labels"),
    "a label too high": (LABELS, idx(np.arange(80) % 11), f"{LABELS} should have labels from 0 to 9, has 0 to 10"),
    "short gzip": (f"{IMAGES}.gz", gzip.compress(idx(np.zeros((80, 28, 28))))[:-9], f"cannot read {IMAGES}.gz: "),
    "no gzip": (f"{IMAGES}.gz", b"text", f"cannot read {IMAGES}.gz: Not a gzipped file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_files_are_one_sentence(fails: Fails, tmp_path: Path, fault: str) -> None:
    name, content, sentence = FAULTS[fault]
    write_idx(tmp_path / "data")
    (tmp_path / name.removesuffix(".gz")).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert sentence in fails("train --out out --data mnist --data-dir data")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "mnist needs --data-dir, the folder where the data are"),
        ("--data-dir none", "no MNIST in none: expected train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-ima"),
        ("--data-dir data --image-size 28", "the images of mnist are 32 x 32: leave --image-size out, got 28"),
    ],
)
def test_options(fails: Fails, tmp_path: Path, options: str, sentence: str) -> None:
    write_idx(tmp_path / "data")
    assert sentence in fails(f"train --out out --data mnist {options}")
