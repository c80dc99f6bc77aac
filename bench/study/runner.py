"""Trains what the study still lacks, run by run; every finished run is one small file of results."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.study.analysis import analyze
from bench.study.plan import Run
from biasloss_ext.benchmarks import machine
from biasloss_ext.benchmarks.results import rounded
from biasloss_ext.errors import UserError
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.files import make_folder, write_text
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.outcome import Outcome
from biasloss_ext.recipes.processes import processes
from biasloss_ext.recipes.recipe import Recipe
from biasloss_ext.version import __version__

RESULTS = Path(__file__).resolve().parent / "results"
CHECKPOINT_STEPS = 50


@dataclass(frozen=True)
class Folders:
    """Where things are.

    Attributes:
        data: of Fashion-MNIST.
        work: for checkpoints of unfinished runs.
        results: for the files of finished runs.
    """

    data: str
    work: Path
    results: Path = RESULTS


def run_all(wanted: Iterable[Run], folders: Folders, device: str = "auto") -> int:
    """Trains those of ``wanted`` that have no results yet; returns how many.

    A killed run resumes from its checkpoint. Several processes may share the folders: each run is one process's.

    Raises:
        UserError: results of another recipe are there, or what `biasloss train` raises.
    """
    done = 0
    for run in wanted:
        path = result_path(run, folders.results)
        if path.exists():
            check_recipe(run, json.loads(path.read_text()), path)
            continue
        with claimed(folders.work / run.name) as mine:
            if mine and not path.exists():
                record = train_one(run, folders, device)
                make_folder(path.parent)
                write_text(path, as_text(record))
                done += 1
            if mine:
                shutil.rmtree(folders.work / run.name, ignore_errors=True)  # before the claim ends
    return done


def train_one(run: Run, folders: Folders, device: str) -> dict[str, Any]:
    """A whole run and what its model does with images, as plain types."""
    recipe = run.recipe(folders.data)
    folder = folders.work / run.name
    with Display() as shown, processes(device) as here:
        outcome = train(recipe, folder, device=device, checkpoint_steps=CHECKPOINT_STEPS, display=shown, title=run.name)
        found = analyze(recipe, folder, here)
        return {
            "run": {"part": run.part.letter, "setting": run.setting.name, "variant": run.variant, "seed": run.seed},
            "accuracy": outcome.accuracy,
            "test_images": outcome.test_images,
            "recipe": portable(recipe),
            "history": _rows(outcome),
            "analysis": found,
            "environment": {
                "date": machine.now(),
                "device": machine.describe(here.device),
                "torch": torch.__version__,
                "biasloss_ext": __version__,
            },
        }


def portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the place of the data on this machine, as JSON gives it back."""
    return json.loads(json.dumps({name: value for name, value in recipe.as_dict().items() if name != "data_dir"}))


def check_recipe(run: Run, record: dict[str, Any], path: Path) -> None:
    """Raises UserError if ``record`` is of another recipe than ``run``."""
    planned = portable(run.recipe())
    there = record["recipe"]
    differing = [name for name in planned if planned[name] != there.get(name, planned[name])]
    if differing:
        raise UserError(
            f"{path} has the results of another recipe ({', '.join(differing)} differ): remove the file to run it anew"
        )


def result_path(run: Run, results: Path) -> Path:
    return results / f"{run.name}.json"


def as_text(record: dict[str, Any]) -> str:
    """JSON with one line per entry of the record, figures to six digits."""
    lines = [f"{json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process has ``folder`` to itself for the block; the claim of a killed process is void."""
    make_folder(folder)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _rows(outcome: Outcome) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in outcome.history]
