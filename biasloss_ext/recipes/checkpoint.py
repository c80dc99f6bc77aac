"""Checkpoints: one file that holds the whole state of a run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from biasloss_ext.errors import UserError
from biasloss_ext.recipes import recipe as recipes
from biasloss_ext.recipes.data.base import Data
from biasloss_ext.recipes.files import whole_file
from biasloss_ext.recipes.recipe import Recipe

NAME = "checkpoint.pt"
FORMAT = 1


def path_of(run: Path) -> Path:
    """The checkpoint of a run, which is named by its folder or by the checkpoint itself."""
    return run if run.is_file() else run / NAME


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes the checkpoint of a run; the one before stays until the new one is whole and on the disk."""
    # Through a file of ours: torch's own says of a full disk that a position is unexpected.
    with whole_file(folder / NAME) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)


def check_space(folder: Path, models: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Check that a checkpoint of these models and the optimizer's state fits next to the previous one.

    Raises:
        UserError: the disk has less room than that.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = 1 if isinstance(optimizer, torch.optim.SGD) else 2
    tensors = [tensor for model in models for tensor in model.state_dict().values() if isinstance(tensor, Tensor)]
    needed = sum(tensor.nbytes for tensor in tensors + moments * parameters)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e6:.3g} MB of free space, a checkpoint takes about {needed / 1e6:.3g} MB: make room, or"
            " choose another --out"
        )


def load(folder: Path, asked: Recipe) -> dict[str, Any] | None:
    """The checkpoint of a run of the recipe ``asked``, on the CPU; None where the folder has none.

    Raises:
        UserError: not a checkpoint of a training run, or one of another recipe.
    """
    path = folder / NAME
    if not path.exists():
        return None
    state = read(path)
    differing = recipes.differences(recipes.from_dict(state["recipe"]), asked)
    if differing:
        raise UserError(f"{path} is of another run ({differing}): choose another --out, or start over with --fresh")
    return state


def describe(data: Data) -> dict[str, Any]:
    """What a run knows of its data, in types that ``torch.load(weights_only=True)`` reads."""
    return {
        **{name: getattr(data, name) for name in ("classes", "channels", "image_size", "train_images", "test_images")},
        "class_names": list(data.class_names),
        "preprocessing": data.preprocessing.as_dict(),
    }


def check_data(folder: Path, state: dict[str, Any] | None, here: dict[str, Any]) -> None:
    """Compares the data of a checkpoint with what :func:`describe` says of those that are here.

    Raises:
        UserError: other classes, another number of images, or other preprocessing.
    """
    if state is None or "class_names" not in state["data"]:
        return
    there = state["data"]
    differences = []
    for names, others, where in ((here, there, "new"), (there, here, "missing")):
        found = [name for name in names["class_names"] if name not in others["class_names"]]
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            differences.append(f"{where} here {'are' if len(found) > 1 else 'is'} {', '.join(found[:5])}{more}")
    if differences:
        raise _other_data(folder, "classes", "; ".join(differences))
    for name in ("train_images", "test_images"):
        if there[name] != here[name]:
            spoken = {"train_images": "training images", "test_images": "test images"}[name]
            raise _other_data(folder, "images", f"{there[name]} {spoken} there, {here[name]} here")
    for name, value in there["preprocessing"].items():
        if here["preprocessing"][name] != value:
            raise _other_data(folder, "preprocessing", f"{name} {value} there, {here['preprocessing'][name]} here")


def _other_data(folder: Path, what: str, differences: str) -> UserError:
    return UserError(
        f"{folder / NAME} is of a run on other {what} ({differences}): bring them back, choose another --out, or begin"
        " anew with --fresh"
    )


def read(path: Path) -> dict[str, Any]:
    """Any checkpoint of a training run, on the CPU.

    Raises:
        UserError: no such file, or another kind of file.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file can be anything
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint: {cause}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or "recipe" not in state:
        raise UserError(f"{path} is not a checkpoint of biasloss train, format {FORMAT}")
    return state


def seed_random_state(seed: int) -> None:
    """Seeds torch, NumPy and Python: what a run ends with must not hang on the process that it began in."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The random states of this process, in types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002, its state is what is asked
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
