"""Image files classified by the model of a training run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.errors import UserError
from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.data.images import Preprocessing, image_files
from biasloss_ext.recipes.files import write_text
from biasloss_ext.recipes.processes import processes
from biasloss_ext.recipes.trained import load_described


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image file.

    Attributes:
        file: the file.
        classes: names of the likeliest classes, the likeliest first.
        probabilities: theirs, in [0, 1].
    """

    file: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """What :func:`predict` found: the predictions in the order of the files, and the files left out as broken, with why."""

    found: list[Prediction]
    left_out: list[str]


def predict(
    run: Path,
    images: Sequence[Path],
    *,
    top_k: int = 1,
    batch_size: int = 32,
    device: str = "auto",
    workers: int = 4,
    skip_broken: bool = False,
) -> Predictions:
    """Classifies image files, prepared as the test images of the run were.

    Args:
        run: folder of a training run.
        images: files, and folders that are searched for files.
        top_k: how many classes to name for each.
        batch_size, workers: images of one pass, and threads that read files; they change the time alone.
        skip_broken: files that cannot be read are left out.

    Raises:
        UserError: no run there, no such file, a broken file, or more classes asked for than there are.
    """
    if not (run / checkpoint.NAME).is_file():
        raise UserError(f"there is no training run in {run}: it has no {checkpoint.NAME}")
    files = _files(images)
    with processes(device) as here:
        model = load_described(run).to(here.device)
        preprocessing: Any = model.preprocessing
        names: tuple[str, ...] = model.class_names  # type: ignore[assignment]
        if top_k > len(names):
            raise UserError(f"--top-k must be at most {len(names)}, the number of classes of {run}, got {top_k}")
        predictions = Predictions([], [])
        for paths, batch in _batches(files, preprocessing, batch_size, workers, skip_broken, predictions.left_out):
            values, indices = _probabilities(model, batch.to(here.device), paths).topk(top_k)
            for path, row, chosen in zip(paths, values.tolist(), indices.tolist(), strict=True):
                predictions.found.append(Prediction(path, tuple(names[index] for index in chosen), tuple(row)))
    return predictions


def as_table(predictions: Sequence[Prediction]) -> str:
    """Lines of file, class and probability, one for every class named."""
    rows = [("file", "class", "probability")]
    for prediction in predictions:
        for number, (name, probability) in enumerate(zip(prediction.classes, prediction.probabilities, strict=True)):
            rows.append(("" if number else str(prediction.file), name, f"{probability:.2%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{file:<{widths[0]}}  {name:<{widths[1]}}  {share:>11}" for file, name, share in rows)


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """Writes one row for every class named: file, rank from 1 on, class, probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "probability"])
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        writer.writerows([prediction.file, rank, name, f"{share:.6g}"] for rank, (name, share) in enumerate(pairs, 1))
    write_text(path, text.getvalue())


def _files(images: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in images:
        if path.is_dir():
            found = image_files(path)
            if not found:
                raise UserError(f"there is no image in the folder {path}")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return list(dict.fromkeys(files))


def _batches(
    files: list[Path],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int,
    skip_broken: bool,
    left_out: list[str],
) -> Iterator[tuple[list[Path], Tensor]]:
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for first in range(0, len(files), batch_size):
            paths = files[first : first + batch_size]
            read = dict(zip(paths, pool.map(partial(_read, preprocessing), paths), strict=True))
            for error in [image for image in read.values() if isinstance(image, UserError)]:
                if not skip_broken:
                    raise UserError(f"{error}; leave such files out with --skip-broken")
                left_out.append(str(error))
            images = {path: image for path, image in read.items() if isinstance(image, Tensor)}
            if images:
                yield list(images), torch.stack(list(images.values()))


def _read(preprocessing: Preprocessing, path: Path) -> Tensor | UserError:
    try:
        return preprocessing.read(path)
    except UserError as error:
        return error


@torch.inference_mode()
def _probabilities(model: nn.Module, images: Tensor, paths: list[Path]) -> Tensor:
    probabilities: Tensor = model(images).float().softmax(1)
    for path, row in zip(paths, probabilities, strict=True):
        if not row.isfinite().all():
            raise UserError(f"the model's scores of {path} are not finite: the run diverged, train with a lower --lr")
    return probabilities
