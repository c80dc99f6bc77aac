"""Learning from the scores of a trained model: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.data import Data
from biasloss_ext.recipes.recipe import Recipe
from biasloss_ext.recipes.trained import load_trained


class Teacher:
    """The model of another run, and its share in the loss.

    Attributes:
        digest: of the teacher's checkpoint; by it a resumed run knows that the teacher is still the same.

    Raises:
        UserError: there is no run in ``folder``, or one that was trained on other classes or other images.
    """

    def __init__(self, folder: Path, recipe: Recipe, data: Data, device: torch.device) -> None:
        model = load_trained(folder)
        _check(folder, model, data)
        self.digest = hashlib.sha256((folder / checkpoint.NAME).read_bytes()).hexdigest()
        self._model = model.to(device)
        if recipe.channels_last:
            self._model = self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._weight, self._temperature = recipe.distill_weight, recipe.distill_temperature

    def share_in(self, loss: Tensor, images: Tensor, scores: Tensor) -> Tensor:
        """``(1 - weight) * loss + weight * T^2 * KL(teacher || student)``, both at temperature T, mean over the images.

        Args:
            loss: 0-d, of the labels.
            images: what the student was given.
            scores: (N, classes), the student's.
        """
        with torch.no_grad():
            taught = self._model(images).float()
        ours, theirs = ((each / self._temperature).log_softmax(1) for each in (scores.float(), taught))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self._temperature**2
        return (1 - self._weight) * loss + self._weight * divergence

    def check_digest(self, state: dict[str, Any]) -> None:
        """Compares the teacher with that of a checkpoint.

        Raises:
            UserError: it was trained again since.
        """
        if state["teacher"] != self.digest:
            raise UserError(
                "the teacher was trained again since this run began: restore its checkpoint, or start over with --fresh"
            )


def _check(folder: Path, model: Any, data: Data) -> None:
    if model.class_names != data.class_names:
        raise UserError(
            f"--teacher must be a run on the same classes, in the same order: {folder} has"
            f" {_few(model.class_names or ())}, here are {_few(data.class_names)}"
        )
    there, here = model.preprocessing.as_dict(), data.preprocessing.as_dict()
    differing = [f"{name} {there[name]} there, {value} here" for name, value in here.items() if there[name] != value]
    if differing:
        raise UserError(f"--teacher must be a run on the same images: {folder} differs ({', '.join(differing)})")


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
