"""Two gloo processes train as one process with the whole batch does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from biasloss_ext.cli import main
from biasloss_ext.recipes import files, loop
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.order import Order, evaluation_batches
from tests.recipes.pictures import write_folder
from tests.recipes.tiny import Interrupting, assert_same, build_small, checkpoint_of, run, use_linear_model, write_cifar

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["biasloss_ext.recipes.loop", "sklearn.datasets"])


def _run(rank: int, port: int, data: Path, out: Path, stop_at: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        use_linear_model(patch)
        display = Interrupting(stop_at) if stop_at else None
        run(data, out, display, checkpoint_steps=1, **options)


def _command(rank: int, port: int, folder: Path, fault: str) -> None:
    """``biasloss train`` as one of two processes, what it says in a file, and something that goes wrong in one of them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(folder)

    def step(display: Display) -> None:
        if fault == "an image breaks":
            (folder / "data" / "val" / "daisy" / "1.png").write_bytes(b"")  # which the second process alone reads
        if fault == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    options = "--image-size 16 --epochs 2 --batch-size 4 --loss ce --device cpu --workers 0"
    sys.argv = ["biasloss", "train", "--data", "imagefolder", "--data-dir", "data", *options.split(), "--out", "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_model", build_small)
        patch.setattr(Display, "step", step)
        if fault == "the disk is full":
            patch.setattr(files.os, "fsync", full)
        main()


FAULTS = {
    "an image is broken": ([2, 2], "biasloss: cannot read the image data/val/daisy/1.png: it is not an image; repair"),
    "an image breaks": ([2, 2], "biasloss: cannot read the image data/val/daisy/1.png: it is not an image"),
    "the disk is full": ([2, 2], "biasloss: cannot write out/metrics.csv: No space left on device"),
    "killed": ([2, -signal.SIGKILL], "biasloss: process 0 lost the connection to another one, which ended without"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_process_says_what_is_wrong_and_the_other_nothing(tmp_path: Path, fault: str) -> None:
    data = write_folder(tmp_path / "data")
    if fault == "an image is broken":
        (data / "val" / "daisy" / "1.png").write_bytes(b"")
    codes, sentence = FAULTS[fault]
    assert _both(_command, tmp_path, fault) == codes
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    assert "Traceback" not in said[0] + said[1], said
    sentences = [line for line in (said[0] + said[1]).splitlines() if "biasloss: " in line]
    assert len(sentences) == 1, said
    assert sentences[0].startswith(sentence)


def _two(data: Path, out: Path, stop_at: int = 0, **options: Any) -> list[int | None]:
    return _both(_run, data, out, stop_at, options)


def _both(target: Callable[..., None], *arguments: Any) -> list[int | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=target, args=(rank, port, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "loss": "ce", "ema_decay": 0.5}], ids=["bias", "ce"])
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    data = write_cifar(tmp_path / "data", images=17)  # so that the test images do not divide evenly
    use_linear_model(monkeypatch)
    alone = run(data, tmp_path / "one", **options)
    assert _two(data, tmp_path / "two", **options) == [0, 0]
    one, two = checkpoint_of(tmp_path / "one"), checkpoint_of(tmp_path / "two")
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["loss"], one["loss"])
    assert len(two["random_states"]) == 2
    for mine, theirs in zip(alone.history, two["history"], strict=True):
        assert set(mine) == set(theirs)
        for name, value in mine.items():
            if name != "seconds":
                assert theirs[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_go_on_to_the_same_bits(tmp_path: Path) -> None:
    data = write_cifar(tmp_path / "data")
    assert _two(data, tmp_path / "whole", loss="ce") == [0, 0]
    assert _two(data, tmp_path / "broken", stop_at=6, loss="ce") == [1, 1]
    assert _two(data, tmp_path / "broken", loss="ce") == [0, 0]
    assert_same(checkpoint_of(tmp_path / "broken"), checkpoint_of(tmp_path / "whole"))


def test_processes_share_the_batches_of_one() -> None:
    whole = Order(50, 12, seed=3, accumulate=2)
    shares = [Order(50, 12, seed=3, accumulate=2, processes=2, process=process) for process in range(2)]
    for epoch in range(2):
        batches = whole.batches(epoch)
        assert [len(batch) for batch in batches] == [6] * 8
        parts = [share.batches(epoch) for share in shares]
        for number, batch in enumerate(batches):
            assert torch.equal(torch.cat([part[number] for part in parts]), batch)
        assert len(torch.cat(batches).unique()) == 48
        for first_step in (1, 3):
            assert all(map(torch.equal, whole.batches(epoch, first_step), batches[2 * first_step :]))
    assert not torch.equal(whole.batches(0)[0], whole.batches(1)[0])
    assert not torch.equal(whole.batches(0)[0], Order(50, 12, seed=4, accumulate=2).batches(0)[0])


def test_every_test_image_is_seen_once() -> None:
    seen = torch.cat([torch.cat(evaluation_batches(17, 4, 2, process)) for process in range(2)])
    assert seen.sort().values.tolist() == list(range(17))
