"""What a training run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from biasloss_ext.recipes.data.images import Broken
from biasloss_ext.recipes.history import Row, accuracy_of
from biasloss_ext.recipes.recipe import Recipe


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        recipe: what was run.
        folder: where its checkpoint, logs and report are.
        history: one row an epoch, as in metrics.csv.
        test_images: how many images the accuracy is taken over.
        left_out: broken files that the run did without, each with the reason.
    """

    recipe: Recipe
    folder: Path
    history: list[Row]
    test_images: int
    left_out: Sequence[Broken] = ()

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch, in [0, 1]; that of the moving average where there is one."""
        return accuracy_of(self.history[-1])
