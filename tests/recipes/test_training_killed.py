"""kill -9 at any moment: no broken file, and the run goes on to the same end."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny import assert_same, checkpoint_of, run, write_cifar

from biasloss_ext.recipes import files

# A server that has imported everything forks each run: a run starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["biasloss_ext.recipes.loop", "sklearn.datasets"])
KILLS = 10


def _run(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    run(data, out, checkpoint_steps=1)


def _start(data: Path, out: Path) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=_run, args=(data, out))
    process.start()
    return process


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


def test_killed_ten_times_at_random(tmp_path: Path) -> None:
    data = write_cifar(tmp_path / "data")
    whole = tmp_path / "whole"
    began = time.monotonic()
    process = _start(data, whole)
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - began

    # A run that ends before its kill makes way for another, so that kills fall everywhere in a run.
    choose = random.Random(0)
    kills, runs = 0, [tmp_path / "run0"]
    while kills < KILLS:
        process = _start(data, runs[-1])
        process.join(choose.uniform(0.1, 0.7) * duration)
        if process.is_alive():
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        else:
            assert process.exitcode == 0
            runs.append(tmp_path / f"run{len(runs)}")
        if runs[-1].exists():
            _check_files(runs[-1])
    _start(data, runs[-1]).join()
    for out in runs:
        if out.exists():
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
