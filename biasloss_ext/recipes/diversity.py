"""Feature diversity of several models side by side, on the test images of one data set."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from biasloss_ext.diversity import (
    LayerDiversity,
    diversity_csv,
    diversity_plot,
    diversity_table,
    layer_variances,
    summarize,
)
from biasloss_ext.errors import UserError
from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.data import Data, load_data
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.files import make_folder, write_text
from biasloss_ext.recipes.models import build_model
from biasloss_ext.recipes.order import evaluation_batches
from biasloss_ext.recipes.processes import processes
from biasloss_ext.recipes.recipe import Recipe, make_recipe
from biasloss_ext.recipes.report import save_plot
from biasloss_ext.recipes.trained import load_trained, trained_recipe

NAME = "report.md"
TABLE_NAME = "diversity.csv"
PLOT_NAME = "diversity.png"


def measure_diversity(
    sources: Sequence[str],
    out: Path,
    *,
    layers: Sequence[str] | None = None,
    threshold: float | None = None,
    batch_size: int = 128,
    device: str = "auto",
    display: Display | None = None,
    **choices: Any,
) -> list[LayerDiversity]:
    """Looks at every layer of every model over all test images, and writes a report, a table and a plot into ``out``.

    Args:
        sources: folders of training runs; or names of models as in the recipe, with a file of weights after ``@``
            (``skipblocknet_m@weights.pt``) or with none, untrained.
        layers: names of modules, the same in every model; None takes the blocks of each model, see
            :func:`biasloss_ext.diversity.default_layers`.
        threshold: the share of samples with a variance below it is counted; None for half the median of each layer.
        batch_size: images of one pass; it changes the time alone.
        choices: of the recipe: ``data``, ``data_dir`` and ``image_size`` of the images, by default those that the runs were
            trained for; ``small_input`` of the models given by name.

    Returns:
        The distributions, model by model, layer by layer.

    Raises:
        UserError: no such run, model, layer or data, or runs of different data; nothing is written then.
    """
    if not sources or len(set(sources)) != len(sources):
        raise UserError(f"give each run or model once, got {', '.join(sources) or 'none'}")
    for source in sources:
        if os.sep in source.partition("@")[0] and not _is_run(source):
            raise UserError(f"there is no training run in {source}: it has no {checkpoint.NAME}")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    small_input = choices.pop("small_input", None)
    recipe = _images(sources, {name: value for name, value in choices.items() if value is not None})
    variances: dict[str, dict[str, Tensor]] = {}
    with processes(device) as here, Display() if display is None else nullcontext(display) as shown:
        images = load_data(recipe, here.device)
        models = {source: _model(source, recipe, images, small_input) for source in sources}
        batches = evaluation_batches(images.test_images, batch_size)
        for name, model in zip(_short(sources), models.values(), strict=True):
            shown.begin_run(name, len(batches), 0)
            try:
                variances[name] = layer_variances(model.to(here.device), _counted(images, batches, shown), layers)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            finally:
                shown.end_run()
    rows = summarize(variances, threshold)
    make_folder(out)
    write_text(out / TABLE_NAME, diversity_csv(rows))
    save_plot(diversity_plot(rows), out / PLOT_NAME)
    title = f"# Feature diversity on {recipe.data}"
    write_text(out / NAME, "\n".join([title, "", *diversity_lines(rows)]) + "\n")
    return rows


def diversity_lines(rows: Sequence[LayerDiversity], plots: str = "") -> list[str]:
    """Table and plot as lines of Markdown; ``plots`` is what leads from the text to the folder of the plot."""
    return [
        f"Variance of a sample's activations in each layer, over {rows[0].samples} test images.",
        "",
        diversity_table(rows),
        f"![variance over the layers]({plots}{PLOT_NAME})",
    ]


def _images(sources: Sequence[str], wanted: dict[str, str | int]) -> Recipe:
    """A recipe for the data alone: what is asked for, else what the runs were trained for."""
    if "data" in wanted:
        return make_recipe(str(wanted.pop("data")), **wanted)
    recipes = [trained_recipe(Path(source)) for source in sources if _is_run(source)]
    if not recipes:
        # A name that is no model is more likely the mistake than the missing option.
        for source in sources:
            build_model(make_recipe("digits", model=source.partition("@")[0], loss="ce"), 10, 3, 32)
        raise UserError("say with --data on which images, since there is no training run among the models")
    kinds = list(dict.fromkeys((recipe.data, recipe.image_size) for recipe in recipes))
    if len(kinds) > 1:
        listed = ", ".join(f"{name} at {size} x {size}" for name, size in kinds)
        raise UserError(f"the runs were trained for different images ({listed}): say with --data which to take")
    return dataclasses.replace(recipes[0], **wanted)  # type: ignore[arg-type]


def _model(source: str, images_of: Recipe, images: Data, small_input: bool | None) -> nn.Module:
    if _is_run(source):
        return load_trained(Path(source))
    name, _, weights = source.partition("@")
    recipe = make_recipe(
        images_of.data,
        model=name,
        weights=weights or None,
        loss="ce",
        image_size=images.image_size,
        small_input=small_input,
    )
    return build_model(recipe, images.classes, images.channels, images.image_size)


def _is_run(source: str) -> bool:
    return (Path(source) / checkpoint.NAME).is_file()


def _short(sources: Sequence[str]) -> list[str]:
    """The last part of each path where these differ."""
    names = [Path(source.rstrip("/")).name if _is_run(source) else source for source in sources]
    return names if len(set(names)) == len(names) else list(sources)


def _counted(images: Data, batches: Sequence[Tensor], display: Display) -> Iterator[Tensor]:
    for batch, _ in images.test_batches(batches):
        yield batch
        display.step()
