"""What goes wrong around a training run: disks, data that change, weights of others, missing packages, Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import biasloss_ext.benchmarks
import biasloss_ext.recipes.data
from biasloss_ext import cli
from biasloss_ext.errors import UserError
from biasloss_ext.recipes import checkpoint, compare, files, interrupts, loop
from biasloss_ext.recipes.data import load_data, sound
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.outcome import Outcome
from biasloss_ext.recipes.recipe import Recipe, make_recipe
from biasloss_ext.recipes.report import write_report
from biasloss_ext.recipes.trained import load_trained
from biasloss_ext.recipes.weights import load_weights
from tests.recipes.pictures import broken_files, huge_png, write_folder
from tests.recipes.tiny import Interrupting, SmallLinear, build_small, checkpoint_of


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images, and a model that takes no time."""
    monkeypatch.setattr(loop, "build_model", build_small)
    monkeypatch.setattr("biasloss_ext.recipes.trained.build_model", build_small)
    monkeypatch.setattr(loop, "write_report", lambda outcome: None)  # the plots take longest
    return write_folder(tmp_path / "flowers")


# A server that has imported everything forks the processes.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["biasloss_ext.recipes.loop", "sklearn.datasets"])


def recipe_for(data: Path, **options: Any) -> Recipe:
    small = {"image_size": 16, "epochs": 2, "batch_size": 4, "loss": "ce", "warmup_epochs": 0, "lr": 0.01}
    return make_recipe("imagefolder", data_dir=str(data), **{**small, **options})


class Hearing(Display):
    def __init__(self) -> None:
        super().__init__(shown=False)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run(data: Path, out: Path, display: Display | None = None, **options: Any) -> Outcome:
    own = {
        name: options.pop(name) for name in ("fresh", "skip_broken", "workers", "checkpoint_steps") if name in options
    }
    return train(recipe_for(data, **options), out, device="cpu", display=display or Display(shown=False), **own)


# Broken images


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_image_is_found_before_the_first_step(flowers: Path, tmp_path: Path, split: str) -> None:
    (flowers / split / "rose" / "2.png").write_bytes(huge_png())
    (flowers / split / "rose" / "9.jpg").write_bytes(broken_files()["short.jpg"][0])
    with pytest.raises(UserError) as raised:
        run(flowers, tmp_path / "out")
    said = str(raised.value)
    assert re.search(rf"cannot read the image .*{split}/rose/2\.png: .* and 1 more cannot be read; repair or", said)
    assert "--skip-broken" in said
    assert not (tmp_path / "out").exists()


def test_broken_images_can_be_left_out(flowers: Path, tmp_path: Path) -> None:
    (flowers / "train" / "rose" / "2.png").write_bytes(b"")
    (flowers / "val" / "daisy" / "0.png").write_bytes(b"")
    display = Hearing()
    outcome = run(flowers, tmp_path / "out", display, skip_broken=True)
    assert outcome.test_images == 7
    assert "left out as broken: " in display.said[0]
    assert "train/rose/2.png (it is not an image) and 1 more, all named in the report" in display.said[0]
    write_report(outcome)
    report = (tmp_path / "out" / "report.md").read_text()
    for name in ("train/rose/2.png", "val/daisy/0.png"):
        assert f"| {flowers / name} | it is not an image |" in report
    assert checkpoint_of(tmp_path / "out")["data"]["train_images"] == 7
    for name in range(4):
        (flowers / "val" / "daisy" / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="all images of the class daisy are broken"):
        run(flowers, tmp_path / "other", skip_broken=True)


def test_processes_share_the_search_for_broken_images(flowers: Path) -> None:
    broken = [flowers / "train" / "daisy" / "1.png", flowers / "val" / "rose" / "3.png"]
    for path in broken:
        path.write_bytes(b"")
    data = load_data(recipe_for(flowers), torch.device("cpu"))
    parts = [data.broken(number, 3) for number in range(3)]  # type: ignore[attr-defined]
    assert sorted(path for part in parts for path, _ in part) == broken

    class Here(SimpleNamespace):
        def gather_objects(self, mine: Any) -> list[Any]:
            return parts

    with pytest.raises(UserError, match=r"daisy/1\.png: it is not an image and 1 more"):
        sound.check_images(data, Here(number=2, count=3))  # type: ignore[arg-type]


def test_an_image_that_vanishes_later_is_named(flowers: Path, tmp_path: Path) -> None:
    class Removing(Display):
        def step(self) -> None:
            (flowers / "val" / "rose" / "1.png").unlink(missing_ok=True)

    with pytest.raises(UserError, match=r"cannot read the image .*val/rose/1\.png: No such file or directory"):
        run(flowers, tmp_path / "out", Removing(shown=False), workers=1)


# Data that change between two calls


def _add_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "tulip").mkdir()
        (data / split / "daisy" / "0.png").rename(data / split / "tulip" / "0.png")


def _rename_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "daisy").rename(data / split / "tulip")


def _remove(split: str) -> Any:
    return lambda data: (data / split / "rose" / "0.png").unlink()


CHANGES: dict[str, tuple[Any, str]] = {
    "a class more": (_add_class, r"on other classes \(new here is tulip\): bring them back, choose another --out, or"),
    "a class renamed": (_rename_class, r"on other classes \(new here is tulip; missing here is daisy\)"),
    "a training image less": (_remove("train"), r"on other images \(8 training images there, 7 here\)"),
    "a test image less": (_remove("val"), r"on other images \(8 test images there, 7 here\)"),
}


@pytest.mark.parametrize(("change", "finished"), [("a class more", True), *((change, False) for change in CHANGES)])
def test_a_run_knows_its_data(flowers: Path, tmp_path: Path, change: str, finished: bool) -> None:
    out = tmp_path / "out"
    if finished:
        run(flowers, out)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(flowers, out, Interrupting(3))
    before = (out / "checkpoint.pt").read_bytes()
    alter, sentence = CHANGES[change]
    alter(flowers)
    with pytest.raises(UserError, match=sentence):
        run(flowers, out)
    assert (out / "checkpoint.pt").read_bytes() == before
    assert run(flowers, out, fresh=True).history[0]["epoch"] == 1


def test_a_run_knows_its_preprocessing(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(flowers, tmp_path / "out")
    monkeypatch.setattr("biasloss_ext.recipes.data.stored.MEAN", (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match=r"on other preprocessing \(mean \(0\.485, 0\.456, 0\.406\) there, \(0\.5, "):
        run(flowers, tmp_path / "out")


def test_a_comparison_knows_its_data(flowers: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": "imagefolder", "data_dir": str(flowers), "image_size": 16, "epochs": 1}
    options |= {"batch_size": 4, "models": ["skipblocknet_xs"], "losses": ["ce", "focal"], "seeds": [0]}
    compare.compare(tmp_path / "out", **options, display=Display(shown=False))
    _rename_class(flowers)
    with pytest.raises(UserError, match=r"runs/skipblocknet_xs-ce-seed0/checkpoint\.pt is of a run on other classes"):
        compare.compare(tmp_path / "out", **options, display=Display(shown=False))


def test_checkpoints_of_older_versions_go_on(flowers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(flowers, out, Interrupting(3))
    state = checkpoint_of(out)
    state["data"] = {name: state["data"][name] for name in ("classes", "channels", "image_size")}
    torch.save(state, out / "checkpoint.pt")
    assert load_trained(out).class_names is None
    assert len(run(flowers, out).history) == 2
    assert load_trained(out).class_names == ("daisy", "rose")


# Disks


def _on_a_small_disk(data: Path, out: Path, said: Any) -> None:
    """Runs while no file may grow beyond some bytes; a process of its own, whose parent writes files too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    loop.build_model = build_small  # type: ignore[assignment]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with contextlib.suppress(KeyboardInterrupt):
        run(data, out, Interrupting(3))
    size = (out / "checkpoint.pt").stat().st_size
    # The checkpoint, the first bytes of the log, the log of an epoch, the checkpoint again.
    for limit, folder in ((size // 2, out), (0, out / "0"), (30, out / "30"), (2000, out / "2000")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            run(data, folder)
            said.send("nothing")
        except UserError as error:
            said.send(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint(
    flowers: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    end, said = multiprocessing.Pipe()
    process = PROCESSES.Process(target=_on_a_small_disk, args=(flowers, out, said))
    process.start()
    process.join(60)
    sentences = [end.recv() for _ in range(4)]
    assert sentences[0] == f"cannot write {out}/checkpoint.pt: File too large; the file that was there is unchanged"
    for sentence in sentences[1:]:
        assert re.fullmatch(r"cannot write .*/out/[a-z./0-9]+: File too large", sentence)
    assert (checkpoint_of(out)["epoch"], checkpoint_of(out)["step"]) == (1, 0)
    assert not list(out.glob(".*"))
    assert len(run(flowers, out).history) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_what_the_system_says_against_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    files.write_text(tmp_path / "metrics.csv", "old")
    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/metrics.csv: {os.strerror(number)}; the file that"):
        files.write_text(tmp_path / "metrics.csv", "new")
    assert (tmp_path / "metrics.csv").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_nobody_may_write_into(flowers: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write /proc/self/metrics\.csv: No such file or directory"):
        run(flowers, Path("/proc/self"))
    with pytest.raises(UserError, match="cannot make the folder /proc/none/out: No such file"):
        run(flowers, Path("/proc/none/out"))


def test_too_little_room_is_found_before_the_first_step(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=60_000))
    with pytest.raises(UserError, match=r"has 0\.06 MB of free space, a checkpoint takes about 0\.074 MB: make room"):
        run(flowers, tmp_path / "out", ema_decay=0.9)
    assert run(flowers, tmp_path / "out").history  # without the average it fits


# What the report says


def test_best_epoch_and_last_epoch_are_of_the_same_weights(tmp_path: Path) -> None:
    accuracies = [(0.9, 0.1), (0.2, 0.6), (0.3, 0.5)]
    history = [
        {"epoch": epoch, "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": raw, "ema_test_accuracy": average}
        | {"seconds": 1.0}
        for epoch, (raw, average) in enumerate(accuracies, 1)
    ]
    outcome = Outcome(make_recipe("digits", ema_decay=0.99), tmp_path, history, 10)
    write_report(outcome)
    report = (tmp_path / "report.md").read_text()
    assert "**50.00%** of 10 images (best epoch: 60.00%, epoch 2)" in report


# Weights


def test_weights_for_other_classes(flowers: Path, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in SmallLinear(1000).state_dict().items()}}, tmp_path / "many.pt"
    )
    display = Hearing()
    run(flowers, tmp_path / "out", display, weights=str(tmp_path / "many.pt"), epochs=1)
    assert display.said[0] == (
        f"{tmp_path}/many.pt has 1000 classes, the run has 2: the classifier (scores.weight, scores.bias) starts at random"
    )
    model = SmallLinear(2)
    untouched = model.scores.weight.clone()
    load_weights(model, tmp_path / "many.pt", "linear", [])
    assert torch.equal(model.scores.weight, untouched)
    saved = torch.load(tmp_path / "many.pt")["state_dict"]
    assert torch.equal(model.hidden.weight, saved["module.hidden.weight"])
    with pytest.raises(UserError, match=r"2 of another shape, as scores.bias \(1000,\) for \(2,\), scores.weight"):
        load_weights(model, tmp_path / "many.pt", "linear")


# Missing packages


@pytest.mark.parametrize(
    ("package", "command", "module"),
    [
        ("tensorboard", "train --out out", "recipes.history"),
        ("torchmetrics", "train --out out", "recipes.evaluation"),
        ("sklearn", "train --out out", "recipes.data.digits"),
        ("matplotlib", "diversity skipblocknet_xs --data digits --out out", "recipes.report"),
        ("scipy", "compare --out out", "recipes.statistics"),
        ("rich", "train --out out", "recipes.display"),
        ("PIL", "predict --run out x.png", "recipes.data.images"),
        ("typer", "train --out out", "recipes.commands"),
    ],
)
def test_a_missing_package_is_one_sentence(
    package: str,
    command: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for parent in (biasloss_ext, biasloss_ext.recipes, biasloss_ext.recipes.data, biasloss_ext.benchmarks):
        for name, value in list(vars(parent).items()):  # an import puts the new module into its package
            monkeypatch.setattr(parent, name, value)
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith(("biasloss_ext.recipes", "torch.utils.tensorboard")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    if package in ("typer", "PIL", "rich"):
        monkeypatch.delitem(sys.modules, "biasloss_ext.benchmarks.command", raising=False)
    monkeypatch.setattr("sys.argv", ["biasloss", *command.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert said.startswith("biasloss: this command needs the extra [train], of which ")
    assert said.endswith("pip install 'biasloss_ext[train]'\n")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Ctrl-C

_interrupts_forks = False


def _interrupt_in_a_callback() -> None:
    if _interrupts_forks:
        os.kill(os.getpid(), signal.SIGINT)


os.register_at_fork(before=_interrupt_in_a_callback)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Interrupts as in a terminal: a process in the background ignores them, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_workers_start_ends_the_run(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_interrupts_forks", True)
    with pytest.raises(KeyboardInterrupt):
        run(flowers, tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_interrupts_that_get_lost_are_raised_at_the_next_step() -> None:
    def lost() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    with interrupts.watched():
        interrupts.check()
        lost()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()
    with pytest.raises(KeyboardInterrupt), interrupts.watched():
        lost()

    def own(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGINT, own)
    try:
        with interrupts.watched():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
