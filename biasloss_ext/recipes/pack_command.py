"""The command ``data pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biasloss_ext.recipes.options import SkipBroken

MEGABYTE = 1_000_000


def pack(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Image folder, as for --data imagefolder.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the packed data set; must not exist.", show_default=False)],
    side: Annotated[int, typer.Option(help="Pixels of the shorter side; smaller images stay as they are.")] = 256,
    encoding: Annotated[
        str, typer.Option(help="raw (pixels, the fastest) or jpeg (about an eighth of the space).")
    ] = "raw",
    quality: Annotated[int, typer.Option(help="Of jpeg, 1 to 100.")] = 95,
    shard_size: Annotated[int, typer.Option(min=1, help="MB of a file.")] = 128,
    skip_broken: SkipBroken = False,
    workers: Annotated[int, typer.Option(min=0, help="Threads that read image files.")] = 4,
) -> None:
    """Resize every image of a folder once, for --data packed: training then reads it several times as fast."""
    from biasloss_ext.recipes.data.packing import Packing
    from biasloss_ext.recipes.data.packing import pack as run
    from biasloss_ext.recipes.display import Display

    packing = Packing(side, encoding, quality, shard_size * MEGABYTE, skip_broken, workers)
    with Display() as display:
        packed = run(folder, out, packing, lambda found, count: display.counted("packing", found, count))
    for name, reason in packed["left_out"]:
        typer.echo(f"left out as broken: {folder / name}: {reason}")
    shards = packed["train"] + packed["test"]
    images, size = (sum(shard[key] for shard in shards) for key in ("images", "bytes"))
    typer.echo(f"{images} images of {len(packed['class_names'])} classes in {out}, {size / 1e6:.4g} MB")
