"""The commands ``train``, ``compare``, ``predict`` and ``diversity``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.options import Data, Out, whole_numbers, with_recipe_options
from biasloss_ext.recipes.recipe import CHOICES, make_recipe
from biasloss_ext.recipes.run_options import RunOptions


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"{option} takes names between commas, got {text!r}")
    return names


@with_recipe_options(run_options=True)
def train(
    *,
    data: Data = "digits",
    out: Out = Path("runs/train"),
    **options: Any,
) -> None:
    """Train a classifier; the same command resumes an interrupted run. Works under torchrun."""
    how, choices = RunOptions.split(options)
    recipe = make_recipe(data, **choices)
    from biasloss_ext.recipes.loop import train as run

    outcome = run(recipe, out, title=recipe.loss, **how)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"test accuracy {outcome.accuracy:.2%}; report in {out / 'report.md'}")


@with_recipe_options("model", "loss", "seed", run_options=True)
def compare(
    *,
    data: Data = "digits",
    models: Annotated[
        str | None,
        typer.Option(
            help="Models between commas; the data set's default and mobilenet_v3_large if not given.",
            show_default=False,
        ),
    ] = None,
    losses: Annotated[str, typer.Option(help="Losses between commas.")] = "bias,ce",
    seeds: Annotated[str, typer.Option(help="Seeds between commas.")] = "0,1,2",
    out: Out = Path("runs/compare"),
    **options: Any,
) -> None:
    """Compare losses or models over several seeds, and report whether they differ; the same command resumes."""
    from biasloss_ext.recipes.compare import compare as run

    found = run(
        out,
        data=data,
        models=None if models is None else _names("--models", models),
        losses=_names("--losses", losses),
        seeds=whole_numbers("--seeds", seeds),
        **options,
    )
    for difference in found.differences:
        typer.echo(f"{difference.first} minus {difference.second}: {100 * difference.mean:+.2f}, {difference.verdict}")
    typer.echo(f"report in {out / 'report.md'}")


def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Image files, and folders of them.", show_default=False)
    ],
    run: Annotated[Path, typer.Option(help="Folder of a training run.", show_default=False)],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 1,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file instead of a table.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one pass.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Threads that read image files.")] = 4,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out image files that cannot be read.")
    ] = False,
) -> None:
    """Classify image files with the model of a training run."""
    from biasloss_ext.recipes.predict import as_table, write_csv
    from biasloss_ext.recipes.predict import predict as classify

    if csv is not None and not csv.parent.is_dir():
        raise UserError(f"there is no folder {csv.parent} to write {csv.name} into")
    predictions = classify(
        run, images, top_k=top_k, batch_size=batch_size, device=device, workers=workers, skip_broken=skip_broken
    )
    for sentence in predictions.left_out:
        typer.echo(f"left out: {sentence}", err=True)
    if csv is None:
        typer.echo(as_table(predictions.found))
        return
    write_csv(csv, predictions.found)
    typer.echo(f"{len(predictions.found)} images classified, in {csv}")


def diversity(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folders of training runs, or models as for train, MODEL@FILE with weights or MODEL untrained.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help=f"Data set, {', '.join(CHOICES['data'])}; by default that of the runs.", show_default=False),
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of the data.", show_default=False)] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of the images.", show_default=False)] = None,
    small_input: Annotated[
        bool | None, typer.Option(help="As for train, for models given by name.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Modules between commas, the same in every model; by default its blocks.", show_default=False
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Report the share of images with a variance below this; by default half the median of each layer.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one pass.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for report.md, diversity.csv and diversity.png.")] = Path(
        "runs/diversity"
    ),
) -> None:
    """Report how much the activations of an image vary, layer by layer, for several models side by side."""
    from biasloss_ext.recipes.diversity import measure_diversity

    measure_diversity(
        sources,
        out,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        small_input=small_input,
        layers=None if layers is None else _names("--layers", layers),
        threshold=threshold,
        batch_size=batch_size,
        device=device,
    )
    typer.echo(f"report in {out / 'report.md'}")
