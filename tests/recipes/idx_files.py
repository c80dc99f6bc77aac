"""Small data sets in IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

EMNIST_PARTS = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")


def idx(values: np.ndarray) -> bytes:
    """The bytes of an IDX file of unsigned bytes."""
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_idx(
    folder: Path,
    files: tuple[str, ...] = FILES,
    train_images: int = 80,
    test_images: int = 16,
    classes: int = 10,
    first_label: int = 0,
    compressed: bool = False,
) -> dict[str, np.ndarray]:
    """Noise whose brightness tells the class. Returns what is in each file, labels from ``first_label`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    written: dict[str, np.ndarray] = {}
    for number, count in ((0, train_images), (2, test_images)):
        labels = np.arange(count) % classes
        images = generator.integers(0, 60, (count, 28, 28)) + (190 // classes) * labels[:, None, None]
        written |= {files[number]: images.astype(np.uint8), files[number + 1]: labels + first_label}
    for name, values in written.items():
        content = idx(values)
        (folder / f"{name}{'.gz' * compressed}").write_bytes(gzip.compress(content) if compressed else content)
    return written
