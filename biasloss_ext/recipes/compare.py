"""The same recipe with several losses or models, over several seeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from biasloss_ext.errors import UserError
from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.compare_report import write_comparison
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.loop import check, train
from biasloss_ext.recipes.models import unavailable
from biasloss_ext.recipes.outcome import Outcome
from biasloss_ext.recipes.recipe import Recipe, make_recipe
from biasloss_ext.recipes.run_options import RunOptions
from biasloss_ext.recipes.statistics import Difference, paired_difference

BASELINE = "mobilenet_v3_large"


@dataclass(frozen=True)
class Entry:
    """A model with a loss, and its runs.

    Attributes:
        model, loss: as in the recipe.
        outcomes: one finished run a seed, in their order; none where the model is unavailable.
        unavailable: why the model cannot be had here, or None.
    """

    model: str
    loss: str
    outcomes: tuple[Outcome, ...] = ()
    unavailable: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} with {self.loss}"

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies after the last epoch, in [0, 1], one a seed."""
        return [outcome.accuracy for outcome in self.outcomes]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        folder: where the report, the tables, the plot and all runs are.
        recipe: what all runs share; its model, loss and seed are those of the first.
        seeds: in the order of every entry's outcomes.
        entries: all models with all losses, unavailable ones too.
        differences: between entries that differ in the loss alone or in the model alone, the first named minus the other.
        test_images: how many images the accuracies are taken over.
    """

    folder: Path
    recipe: Recipe
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    differences: tuple[Difference, ...]
    test_images: int


def compare(
    out: Path,
    *,
    data: str = "digits",
    models: Sequence[str] | None = None,
    losses: Sequence[str] = ("bias", "ce"),
    seeds: Sequence[int] = (0, 1, 2),
    display: Display | None = None,
    **options: Any,
) -> Comparison:
    """Trains every model with every loss and every seed, and writes a report with tables and plots into ``out``.

    Runs with the same seed see the same images in the same order with the same augmentation, so that their differences
    are taken in pairs. Each run has a folder of its own below ``out/runs``: called again after an interruption, the
    finished runs are read, and the interrupted one resumes. In one process, not under torchrun.

    Args:
        models: names as in the recipe; None takes the data set's default and MobileNetV3-Large. One whose package cannot
            be imported is reported as unavailable, and the rest is done.
        losses, seeds: at least one each.
        display: shows progress there; one of its own by default.
        options: fields of :class:`biasloss_ext.recipes.run_options.RunOptions`, and all other choices of
            :class:`biasloss_ext.recipes.recipe.Recipe`, the same for all runs.

    Raises:
        UserError: a wrong choice, fewer than two things to compare, or what :func:`biasloss_ext.recipes.loop.train`
            raises; all that can be known beforehand is told before anything is written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a comparison runs in one process: start it without torchrun")
    how, choices = RunOptions.split(options)
    run = RunOptions(**how)
    if models is None:
        models = (make_recipe(data, **choices).model, BASELINE)
    for name, values in (("models", models), ("losses", losses), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise UserError(f"give each of the {name} once, got {', '.join(map(str, values)) or 'none'}")
    # For all of them: a wrong name is told although another package is missing.
    recipes = {
        (model, loss): [make_recipe(data, **choices, model=model, loss=loss, seed=seed) for seed in seeds]
        for model, loss in product(models, losses)
    }
    reasons = {model: unavailable(model) for model in models}
    available = {key: variants for key, variants in recipes.items() if reasons[key[0]] is None}
    if len(available) < 2:
        missing = [reason for reason in reasons.values() if reason]
        raise UserError("; ".join(["two or more losses or models are needed for a comparison", *missing]))
    outcomes: dict[tuple[str, str], list[Outcome]] = {key: [] for key in recipes}
    with Display() if display is None else nullcontext(display) as shown:
        for variants in available.values():
            described = check(variants[0], run.device, run.workers, run.skip_broken, shown)
            for recipe in () if run.fresh else variants:
                folder = run_folder(out, recipe)
                checkpoint.check_data(folder, checkpoint.load(folder, recipe), described)
        shown.begin_all("comparison", len(available) * len(seeds))
        for number, key in product(range(len(seeds)), available):
            recipe = available[key][number]
            outcome = train(
                recipe,
                run_folder(out, recipe),
                display=shown,
                title=f"{recipe.model}, {recipe.loss}, seed {recipe.seed}",
                **how,
            )
            outcomes[key].append(outcome)
    entries = tuple(Entry(*key, tuple(outcomes[key]), reasons[key[0]]) for key in recipes)
    test_images = next(entry.outcomes[0].test_images for entry in entries if entry.outcomes)
    first = next(iter(available.values()))[0]
    found = Comparison(out, first, tuple(seeds), entries, differences(entries, test_images), test_images)
    write_comparison(found)
    return found


def run_folder(out: Path, recipe: Recipe) -> Path:
    """The folder of one run of a comparison whose folder is ``out``."""
    return out / "runs" / f"{recipe.model.replace(':', '-')}-{recipe.loss}-seed{recipe.seed}"


def differences(entries: Sequence[Entry], test_images: int) -> tuple[Difference, ...]:
    """Every loss against the first within a model, and every model against the first within a loss, first minus other."""
    available = [entry for entry in entries if entry.outcomes]
    pairs = [
        (first, second)
        for index, second in enumerate(available)
        for first in (_first(available[:index], model=second.model), _first(available[:index], loss=second.loss))
        if first is not None
    ]
    return tuple(
        paired_difference(
            a.name, b.name, a.accuracies, b.accuracies, resolution=1 / test_images, comparisons=len(pairs)
        )
        for a, b in pairs
    )


def _first(entries: Sequence[Entry], **same: str) -> Entry | None:
    return next((e for e in entries if all(getattr(e, name) == value for name, value in same.items())), None)
