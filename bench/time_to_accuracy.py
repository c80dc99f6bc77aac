"""``python -m bench.time_to_accuracy``: from the start of a training to an accuracy, into bench/results/time_to_accuracy.json.

The recipes of ``biasloss train`` on fused kernels and on plain PyTorch (``--fused off``), by turns, one seed after the
other. What is counted is CPU time on one thread, tests after every epoch included, so that other programs hardly matter.
Runs that are in the file are not repeated. `python -m bench.pages` writes the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from biasloss_ext.benchmarks import machine
from biasloss_ext.benchmarks.table import Table
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.history import Row, accuracy_of
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.recipe import make_recipe

RESULTS = Path(__file__).resolve().parent / "results" / "time_to_accuracy.json"
TARGETS = {"digits": 0.98, "fashion_mnist": 0.90}
CONTENDERS = {"biasloss_ext": "auto", "plain PyTorch": "off"}
SEEDS = (0, 1, 2)
CPU = torch.device("cpu")

Run = dict[str, Any]


class Reached(Exception):
    """The accuracy is there."""


class Clock(Display):
    """Ends a training after the epoch that reaches ``target``."""

    def __init__(self, target: float, now: Callable[[], float] = time.process_time) -> None:
        super().__init__(shown=False)
        self._target, self._now, self._began = target, now, now()
        self.seconds, self.epochs, self.accuracy = 0.0, 0, 0.0

    def epoch(self, row: Row, epochs: int) -> None:
        self.seconds, self.epochs, self.accuracy = self._now() - self._began, int(row["epoch"]), accuracy_of(row)
        if self.accuracy >= self._target:
            raise Reached


def measure(data: str, contender: str, seed: int, **options: Any) -> Run:
    """One training until the accuracy is reached or the recipe ends.

    Args:
        options: choices of the recipe.

    Returns:
        Seconds of CPU time, epochs, the accuracy, and whether it was the one that is asked for.
    """
    recipe = make_recipe(data, seed=seed, fused=CONTENDERS[contender], **options)
    clock, reached = Clock(TARGETS[data]), False
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(recipe, Path(folder), device="cpu", display=clock)
        except Reached:
            reached = True
    figures = {"seconds": round(clock.seconds, 2), "epochs": clock.epochs, "accuracy": round(clock.accuracy, 6)}
    return {"data": data, "contender": contender, "seed": seed, **figures, "reached": reached}


def table(runs: list[Run]) -> Table:
    """A row per data set and contender: the median of its runs, each run's, and the ratio to ours."""
    rows = []
    for data, target in TARGETS.items():
        medians: dict[str, float] = {}
        for contender in CONTENDERS:
            chosen = [run for run in runs if (run["data"], run["contender"]) == (data, contender)]
            if not chosen:
                continue
            medians[contender] = statistics.median(run["seconds"] for run in chosen)
            ratio = medians[contender] / next(iter(medians.values()))
            each = ", ".join(_of_run(run) for run in chosen)
            name = f"{target:.0%} on {data}"
            rows.append((name, contender, f"{medians[contender] / 60:.3g}", f"{ratio:.2f}", each))
    head = ("accuracy", "training", "minutes, median", "times ours", "each seed: minutes (epochs)")
    return Table("", head, rows)


def _of_run(run: Run) -> str:
    missed = "" if run["reached"] else f", {run['accuracy']:.1%} at the end"
    return f"{run['seconds'] / 60:.3g} ({run['epochs']}{missed})"


def section(path: Path = RESULTS) -> list[str]:
    """Lines for the page on performance; none without results."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return [
        "## Time to accuracy",
        "",
        "`biasloss train` with its default recipe (SkipblockNet-XS, Bias Loss) until the test accuracy is reached, against the",
        "same with `--fused off`, that is, PyTorch's own kernels in channels_last. Minutes of CPU time on one thread, tests",
        f"after every epoch included, by turns; {found['machine']}, torch {found['torch']}.",
        "`python -m bench.time_to_accuracy` measures it.",
        "",
        table(found["runs"]).markdown(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.time_to_accuracy", description=__doc__)
    parser.add_argument("--data", choices=TARGETS, default="digits")
    parser.add_argument("--data-dir", help="folder of the data; digits need none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": machine.describe(CPU)["name"],
        "torch": torch.__version__,
        "runs": [],
    }
    if arguments.out.exists():
        there = json.loads(arguments.out.read_text())
        if {**there, "runs": []} != found:
            raise SystemExit(f"{arguments.out} is of another machine or torch: remove it to measure anew")
        found = there
    done = {(run["data"], run["contender"], run["seed"]) for run in found["runs"]}
    for seed in SEEDS:
        for contender in CONTENDERS:
            if (arguments.data, contender, seed) in done:
                continue
            run = measure(arguments.data, contender, seed, data_dir=arguments.data_dir)
            found["runs"].append(run)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            print(run, flush=True)


if __name__ == "__main__":
    main()
