"""The command ``data check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biasloss_ext.errors import UserError


def check(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Searched for image files, with all folders below.", show_default=False),
    ],
    workers: Annotated[int, typer.Option(min=0, help="Threads that read image files.")] = 4,
) -> None:
    """Read every image file in a folder, and list those that are broken."""
    from biasloss_ext.recipes.data.images import broken_files, image_files
    from biasloss_ext.recipes.display import Display

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files = image_files(folder)
    if not files:
        raise UserError(f"there is no image in the folder {folder}")
    with Display() as display:
        broken = broken_files(files, workers, lambda found, count: display.counted("reading every image", found, count))
    for path, reason in broken:
        typer.echo(f"{path}: {reason}")
    if broken:
        raise UserError(
            f"{len(broken)} of {len(files)} image files in {folder} cannot be read: repair or remove them, or leave them"
            " out of a training with --skip-broken"
        )
    typer.echo(f"all {len(files)} image files in {folder} can be read")
