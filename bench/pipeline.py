"""``python -m bench.pipeline``: images per second that reach a training step, into bench/results/pipeline.json.

Torchvision's ``ImageFolder`` with the same transforms, our image folders, and the same images packed, one after the other
on one core. What is counted is CPU time, so that other programs hardly matter; the files lie in the system's cache.
`python -m bench.pages` writes the table. Needs torchvision.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from biasloss_ext.benchmarks import machine
from biasloss_ext.benchmarks.table import Table
from biasloss_ext.recipes.data import load_data
from biasloss_ext.recipes.data.packing import Packing, pack
from biasloss_ext.recipes.data.stored import MEAN, STD
from biasloss_ext.recipes.optional import torchvision
from biasloss_ext.recipes.order import Order
from biasloss_ext.recipes.recipe import make_recipe
from biasloss_ext.recipes.speed import endless_batches

RESULTS = Path(__file__).resolve().parent / "results" / "pipeline.json"
IMAGES = {(500, 375): 64, (1600, 1200): 64, (4000, 3000): 32}  # of each size
CROP, BATCH, ROUNDS = 224, 16, 12
PEER = "torchvision ImageFolder"
CPU = torch.device("cpu")

Batches = Iterator[tuple[Tensor, Tensor]]


def write_photographs(folder: Path, size: tuple[int, int], images: int) -> None:
    """JPEG files in two classes: parts of scikit-learn's photographs, each another one, enlarged to ``size``."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 2)):
        for number, name in enumerate(("china", "flower")):
            place = folder / split / name
            place.mkdir(parents=True)
            for image in range(count // 2):
                left, top = (int(generator.integers(0, spare)) for spare in (60, 40))
                box = (left, top, left + 580, top + 387)
                photographs[number].resize(size, Image.Resampling.BICUBIC, box).save(place / f"{image}.jpg", quality=90)


def peer(folder: Path) -> Batches:
    """What people write with torchvision."""
    package = torchvision("this measurement")
    to = package.transforms
    steps = [to.RandomResizedCrop(CROP), to.RandomHorizontalFlip(), to.ToTensor(), to.Normalize(MEAN, STD)]
    data = package.datasets.ImageFolder(folder / "train", to.Compose(steps))
    while True:
        yield from torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True)


def ours(kind: str, folder: Path) -> Batches:
    data = load_data(make_recipe(kind, data_dir=str(folder), image_size=CROP), CPU)
    return endless_batches(data, Order(data.train_images, BATCH))


def measure(size: tuple[int, int], images: int, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Images per CPU second by contender, in each of ``rounds`` turns of one batch."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        write_photographs(folder, size, images)
        contenders: dict[str, Callable[[], Batches]] = {
            PEER: lambda: peer(folder),
            "imagefolder": lambda: ours("imagefolder", folder),
        }
        for encoding in ("jpeg", "raw"):
            packed = Path(place) / encoding
            pack(folder, packed, Packing(encoding=encoding))
            contenders[f"packed, {encoding}"] = lambda packed=packed: ours("packed", packed)  # type: ignore[misc]
        running = {name: begin() for name, begin in contenders.items()}
        found: dict[str, list[float]] = {name: [] for name in running}
        for batches in running.values():
            next(batches)
        for _, (name, batches) in itertools.product(range(rounds), running.items()):
            begin = time.process_time()
            next(batches)
            found[name].append(BATCH / (time.process_time() - begin))
    return found


def table(found: dict[str, Any]) -> Table:
    """A row per contender: the medians, and in brackets how many times the first one's."""
    medians = {
        size: {name: statistics.median(rates) for name, rates in rates_of.items()}
        for size, rates_of in found["images_per_second"].items()
    }
    names = next(iter(medians.values()))
    rows = [
        (name, *(f"{_short(rates[name])} ({_short(rates[name] / rates[PEER])})" for rates in medians.values()))
        for name in names
    ]
    return Table("", ("images per CPU second", *(f"JPEG files of {size}" for size in medians)), rows)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def section(path: Path = RESULTS) -> list[str]:
    """Lines for the page on performance; none without results."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return [
        "## Reading images",
        "",
        f"Training images, cut at random, resized to {CROP} x {CROP}, mirrored and normalized, on one core of",
        f"{found['machine']}. In brackets: how many times as many as torchvision's `ImageFolder` gives with the same",
        "transforms. `biasloss data pack` resized the packed images to 256 pixels at their shorter side before. Medians of turns",
        "of one batch each, files in the system's cache; `python -m bench.pipeline` measures it",
        f"(torch {found['versions']['torch']}, torchvision {found['versions']['torchvision']}, Pillow",
        f"{found['versions']['pillow']}, {found['date'][:10]}).",
        "",
        table(found).markdown(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__)
    parser.add_argument(
        "--width", type=int, help="measure the photographs of this width alone, and keep the other figures"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    there = (
        {} if arguments.width is None or not RESULTS.exists() else json.loads(RESULTS.read_text())["images_per_second"]
    )
    for (width, height), images in IMAGES.items():
        if arguments.width in (None, width):
            rates = measure((width, height), images)
            there[f"{width} x {height}"] = {name: [round(rate, 2) for rate in each] for name, each in rates.items()}
    found = {
        "date": machine.now(),
        "machine": machine.describe(CPU)["name"],
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision("this measurement").__version__,
            "pillow": PIL.__version__,
        },
        "images_per_second": there,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found).markdown())


if __name__ == "__main__":
    main()
