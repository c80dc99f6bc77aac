"""The command ``data speed``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from biasloss_ext.recipes.options import Data, Device, SkipBroken, Workers, with_recipe_options
from biasloss_ext.recipes.recipe import make_recipe


@with_recipe_options()
def speed(
    *,
    data: Data = "digits",
    seconds: Annotated[float, typer.Option(help="Time for each measurement, about.")] = 10.0,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Image folder whose pipeline is measured too, as --data imagefolder.",
            show_default=False,
        ),
    ] = None,
    skip_broken: SkipBroken = False,
    device: Device = "auto",
    workers: Workers = 4,
    **options: Any,
) -> None:
    """Measure how many images per second the data pipeline gives without the model, and the training step without it."""
    recipe = make_recipe(data, **options)
    from biasloss_ext.recipes.speed import measure_speed

    found = measure_speed(
        recipe, device=device, workers=workers, skip_broken=skip_broken, seconds=seconds, beside=beside
    )
    typer.echo(f"data pipeline alone: {found.pipeline:.4g} images per second ({recipe.data}, {workers} workers)")
    if found.beside is not None:
        typer.echo(
            f"data pipeline of {beside}: {found.beside:.4g} images per second (imagefolder, {workers} workers);"
            f" {recipe.data} has {found.pipeline / found.beside:.3g} times as many"
        )
    typer.echo(
        f"training step alone: {found.step:.4g} images per second ({recipe.model}, batches of {recipe.batch_size})"
    )
    typer.echo(found.verdict)
