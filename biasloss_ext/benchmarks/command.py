"""The command ``biasloss bench``: options, progress and tables."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from biasloss_ext.errors import UserError

DEFAULT_FOLDER = Path("biasloss-bench")
WIDTH = 200

Quick = Annotated[bool, typer.Option("--quick", help="Fewer shapes and turns: under three minutes on two cores.")]
Ops = Annotated[str | None, typer.Option(help="Which to measure, by commas: feature_variance, bias_loss, ...")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for results.json and the plots; biasloss-bench/DEVICE-DATE by default.", show_default=False
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Limit = Annotated[float | None, typer.Option(help="Seconds after which no more is measured, about.")]
Compare = Annotated[
    tuple[Path, Path] | None, typer.Option(help="Measure nothing: tell changes from noise between two results.json.")
]
Tiny = Annotated[bool, typer.Option("--tiny", hidden=True, help="Shapes that say nothing about speed, for tests.")]


def bench(
    quick: Quick = False,
    ops: Ops = None,
    out: Out = None,
    device: DeviceName = "auto",
    limit: Limit = None,
    compare: Compare = None,
    tiny: Tiny = False,
) -> None:
    """Time the kernels and networks against what one would use instead, on this machine."""
    if compare is not None:
        show_comparison(*compare)
        return
    chosen = _device(device)
    run(chosen, _names(ops), out or _folder(chosen), quick=quick, tiny=tiny, limit=limit)


def run(device: Any, ops: list[str], out: Path, *, quick: bool, tiny: bool, limit: float | None = None) -> None:
    """Measure, save, draw and print."""
    import dataclasses
    import logging

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from biasloss_ext.benchmarks import engine, noise, plots, results, shapes, table

    plan = engine.TINY if tiny else engine.QUICK if quick else engine.FULL
    if limit is not None:
        plan = dataclasses.replace(plan, limit=limit)
    workloads = [w for op in ops for w in shapes.workloads(op, device.type, quick=quick, tiny=tiny)]
    path = out / results.FILE_NAME
    for name in ("torch._dynamo", "torch.onnx"):  # the peers' compilers and exporters tell of their steps
        logging.getLogger(name).setLevel(logging.ERROR)
    console = _console()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bar = progress.add_task("", total=engine.steps(workloads, plan))
        found = engine.run(
            workloads,
            device,
            plan,
            quick=quick,
            tiny=tiny,
            report=lambda text: progress.update(bar, advance=1, description=text),
            save=lambda partial: partial.save(path),
        )
    found.save(path)
    for clock in ("wall", "gpu") if device.type == "cuda" else ("wall",):
        _print(console, table.summary(found, clock))
    if any(entry.status != "ok" for group in found.groups for entry in group.entries):
        _print(console, table.missing(found))
    if len(found.groups) < len(workloads):
        console.print(f"{len(workloads) - len(found.groups)} workloads were left out: the time limit was reached.")
    for complaint in noise.complaints(found):
        console.print(complaint, style="bold red")
    try:
        written = [path, *plots.draw(found, out)]
    except ImportError as error:
        written = [path]
        console.print(f"No plots: {error.name} is not installed; pip install 'biasloss_ext\\[bench]'")
    console.print("written: " + ", ".join(str(file) for file in written))


def show_comparison(before: Path, after: Path) -> None:
    """Print what changed from one run to another, on the GPU's clock where both have it."""
    from biasloss_ext.benchmarks import noise, results, table

    old, new = results.load(before), results.load(after)
    console = _console()
    for what in ("device", "versions"):
        a, b = getattr(old, what), getattr(new, what)
        different = [f"{key} {a.get(key)} / {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
        if different:
            console.print(f"The runs differ in {what}: {', '.join(different)}.", style="bold")
    for clock in ("wall", "gpu"):
        changes = noise.changes(old, new, clock)
        if changes:
            shown = table.comparison(changes)
            _print(console, shown._replace(title=f"{shown.title}, {'GPU' if clock == 'gpu' else 'wall'}"))
        elif clock == "wall":
            raise UserError("the two runs have no workload in common")
    disagreeing = noise.disagreements(old, new)
    if disagreeing:
        console.print(f"Ratios that differ by more than {noise.AGREEMENT:.0%}: {', '.join(disagreeing)}.", style="bold")
    else:
        console.print(f"The runs agree on every ratio of ours and the best peer within {noise.AGREEMENT:.0%}.")
    for name, one in ((before, old), (after, new)):
        for complaint in noise.complaints(one):
            console.print(f"{name}: {complaint}", style="bold red")


def _names(ops: str | None) -> list[str]:
    from biasloss_ext.benchmarks.ops import OPS

    names = list(OPS) if ops is None else [name.strip() for name in ops.split(",")]
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise UserError(f"--ops has {', '.join(unknown)}; there are {', '.join(OPS)}")
    return names


def _device(name: str) -> Any:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _folder(device: Any) -> Path:
    from biasloss_ext.benchmarks import machine

    return DEFAULT_FOLDER / f"{machine.slug(machine.describe(device)['name'])}-{machine.now()[:10]}"


def _console() -> Any:
    """In a file or a pipe there is no width to keep to."""
    from rich.console import Console

    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)


def _print(console: Any, table: Any) -> None:
    from rich.table import Table

    shown = Table(title=table.title)
    for name in table.head:
        shown.add_column(name, overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
