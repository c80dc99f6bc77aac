"""kill -9 at any moment: no broken file, and the run goes on to the same end."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch

from biasloss_ext.recipes import files
from biasloss_ext.recipes.display import Display
from tests.recipes.tiny import assert_same, checkpoint_of, run, write_cifar

# A server that has imported everything forks each run: a run starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["biasloss_ext.recipes.loop", "sklearn.datasets"])
KILLS = 5


class _Deadly(Display):
    """Kills its own process some seconds after the n-th step, or the beginning: while it computes, or writes, or after."""

    def __init__(self, step: int, seconds: float) -> None:
        super().__init__(shown=False)
        self._left = step + 1
        self._timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))

    def begin_run(self, title: str, steps: int, done: int) -> None:
        self.step()

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._timer.start()


def _run(data: Path, out: Path, dies: tuple[int, float] | None) -> None:
    torch.set_num_threads(1)
    # On a subset with wrong labels, which have to be the same after every resume.
    run(data, out, _Deadly(*dies) if dies else None, checkpoint_steps=1, train_images=64, label_noise=0.25)


def _exit_code(data: Path, out: Path, dies: tuple[int, float] | None = None) -> int | None:
    process = PROCESSES.Process(target=_run, args=(data, out, dies))
    process.start()
    process.join()
    return process.exitcode


def _check_files(out: Path) -> None:
    """What bears its final name is whole."""
    if (out / "checkpoint.pt").exists():
        checkpoint_of(out)
    if (out / "metrics.csv").exists():
        rows = list(csv.DictReader((out / "metrics.csv").open()))
        assert all(float(row["seconds"]) >= 0 for row in rows)
    if (out / "report.md").exists():
        assert (out / "report.md").read_text().endswith("| seed | 0 |\n")
    if (out / "curves.png").exists():
        assert b"IEND" in (out / "curves.png").read_bytes()[-12:]


@pytest.mark.slow
@pytest.mark.thorough
def test_killed_at_random_again_and_again(tmp_path: Path) -> None:
    data, whole = write_cifar(tmp_path / "data"), tmp_path / "whole"
    assert _exit_code(data, whole) == 0
    choose = random.Random(0)
    kills, runs = 0, [tmp_path / "run0"]
    while kills < KILLS:
        code = _exit_code(data, runs[-1], (choose.randrange(4), choose.uniform(0, 0.2)))
        if runs[-1].exists():
            _check_files(runs[-1])
        if code == 0:  # too few steps were left: begin another run
            runs.append(tmp_path / f"run{len(runs)}")
        else:
            assert code == -signal.SIGKILL
            kills += 1
    assert _exit_code(data, runs[-1]) == 0
    for out in runs:
        assert_same(checkpoint_of(out), checkpoint_of(whole))
        _check_files(out)
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())


def _write_and_die(path: Path, moment: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment != "while it writes":
        name = {"before it is flushed": "fsync", "before it is moved": "replace"}[moment]
        setattr(files.os, name, die)
    with files.whole_file(path) as temporary, temporary.open("w") as file:
        file.write("half")
        file.flush()
        if moment == "while it writes":
            die()


@pytest.mark.parametrize("moment", ["while it writes", "before it is flushed", "before it is moved"])
def test_a_file_is_the_old_one_until_it_is_whole(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "figures.csv"
    files.write_text(path, "old")
    process = PROCESSES.Process(target=_write_and_die, args=(path, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    files.write_text(path, "old")

    def half_of_it() -> None:
        with files.whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_of_it()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
