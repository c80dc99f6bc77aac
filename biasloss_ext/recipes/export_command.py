"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Folder of a training run, or its checkpoint.pt.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("model.onnx"),
) -> None:
    """Write the model of a training run as ONNX, checked against ONNX Runtime."""
    from biasloss_ext.recipes.export import export as write

    done = write(run, out)
    typer.echo(f"{done.path}: largest difference from PyTorch {done.difference:.1e}, scores reach {done.largest:.2g}")
