"""What the user got wrong: one sentence with the valid choices, exit code 2, nothing half-written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import run, write_cifar

from biasloss_ext.cli import main
from biasloss_ext.recipes.optional import why_not

Fails = Callable[..., str]


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that has to fail, beside which nothing may be written; returns its sentence."""

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def call(command: str) -> str:
        before = files()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["biasloss", *command.split()])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr().err
        assert exit_.value.code == 2, said
        assert said.startswith("biasloss: ")
        assert said.count("\n") == 1
        assert files() == before
        return said.removeprefix("biasloss: ")

    return call


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--data mnist", "unknown data 'mnist': there are digits, cifar10, cifar100, imagefolder"),
        ("--data cifar100", "cifar100 needs --data-dir, the folder where the data are"),
        ("--data cifar100 --data-dir none", "no CIFAR-100 in none: train, test missing"),
        ("--data imagefolder --data-dir none", "expected none/train/CLASS/IMAGE and none/val/CLASS/IMAGE"),
        ("--model resnet18", "unknown model 'resnet18': there are skipblocknet_xs, skipblocknet_s, skipblocknet_m,"),
        ("--features-from blocks.9", "--features-from: the model has no module 'blocks.9'; similar ones: blocks"),
        ("--loss hinge", "unknown loss 'hinge': there are bias, ce, focal"),
        ("--normalisation-mode both", "unknown normalisation mode 'both': there are global, local"),
        ("--optimizer adam", "unknown optimizer 'adam': there are sgd, adamw"),
        ("--amp half", "unknown amp 'half': there are none, bf16, fp16"),
        ("--fused yes", "unknown fused 'yes': there are auto, on, off"),
        ("--weights none.pt", "there is no file none.pt to take weights from"),
        ("--image-size 16", "skipblocknet_xs cannot take images of 16 x 16: images must be of shape (N, 3, H, W)"),
        ("--image-size 4", "the digits are 8 x 8 and can be enlarged only: --image-size must be at least 8, got 4"),
        ("--batch-size 2000", "the batch size is 2000, but there are 1437 training images"),
        ("--batch-size 10 --accumulate 3", "the batch size must be a multiple of 3 (1 processes, 3 accumulated parts)"),
        ("--milestones 3,x", "--milestones takes whole numbers between commas, got '3,x'"),
        ("--lr -1", "lr must be above 0, got -1.0"),
        ("--beta 1", "beta must be below 1, got 1.0"),
        ("--label-smoothing 2", "label smoothing must be in [0, 1], got 2.0"),
        ("--device tpu", "unknown device 'tpu': there are auto, cpu, cuda"),
        (
            "--device cpu --sync-batchnorm",
            "batch normalisation over all processes (--sync-batchnorm) runs on GPUs only",
        ),
    ],
)
def test_train(fails: Fails, options: str, sentence: str) -> None:
    assert sentence in fails(f"train --out out {options}")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_models_of_other_packages(fails: Fails, package: str) -> None:
    reason = why_not(package)
    expected = f"needs {package}, but {reason}" if reason else f"unknown model '{package}:resnet1': similar ones are "
    assert expected in fails(f"train --out out --model {package}:resnet1")


def test_cifar_of_another_size_or_broken(fails: Fails, tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    train = tmp_path / "cifar-100-python" / "train"
    command = "train --data cifar100 --data-dir . --out out"
    assert "the images of cifar100 are 32 x 32" in fails(f"{command} --image-size 64")
    content = train.read_bytes()
    for broken in (b"", content[:500], b"text", pickle.dumps({b"data": 1}), pickle.dumps(print)):
        train.write_bytes(broken)
        assert "cifar-100-python/train is not a file of CIFAR-100's published python version" in fails(command)
    values = pickle.loads(content)
    train.write_bytes(pickle.dumps({**values, b"fine_labels": [100] * 16}))
    assert "should hold one class from 0 to 99 for each of its 16 images" in fails(command)
    train.write_bytes(pickle.dumps({**values, b"data": values[b"data"][:, :3000]}))
    assert "should hold images as uint8 rows of 3 x 32 x 32 = 3072, has uint8 (16, 3000)" in fails(command)


def test_checkpoints_and_weights(fails: Fails, tmp_path: Path) -> None:
    run(write_cifar(tmp_path / "data"), tmp_path / "done", epochs=1)
    assert "done/checkpoint.pt is of another run (data cifar10 there, digits here, " in fails("train --out done")
    of_another = fails("train --out out --model skipblocknet_s --weights done/checkpoint.pt")
    assert "is a checkpoint of another model than skipblocknet_s with 10 classes: " in of_another
    torch.save([1], tmp_path / "list.pt")
    assert "list.pt is not a file of weights: it holds a list" in fails("train --out out --weights list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    assert "text.pt is not a file of weights: " in fails("train --out out --weights text.pt")
    (tmp_path / "done" / "checkpoint.pt").write_bytes(b"half")
    assert "done/checkpoint.pt cannot be read as a checkpoint: " in fails("train --out done")
    assert "cannot make the folder text.pt: " in fails("train --out text.pt --epochs 1")
    assert "done/checkpoint.pt cannot be read as a checkpoint: " in fails("diversity done --out out")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--losses bias,hinge", "unknown loss 'hinge': there are bias, ce, focal"),
        ("--losses bias", "two or more losses or models are needed for a comparison"),
        ("--losses bias,bias", "give each of the losses once, got bias, bias"),
        ("--losses bias,", "--losses takes names between commas, got 'bias,'"),
        ("--models nope", "unknown model 'nope': there are "),
        ("--seeds 0,0", "give each of the seeds once, got 0, 0"),
        ("--seeds some", "--seeds takes whole numbers between commas, got 'some'"),
        ("--data cifar10", "cifar10 needs --data-dir"),
    ],
)
def test_compare(fails: Fails, options: str, sentence: str) -> None:
    models = "" if "--models" in options else "--models skipblocknet_xs "
    assert sentence in fails(f"compare --out out {models}{options}")


def test_compare_is_not_for_torchrun(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a comparison runs in one process: start it without torchrun" in fails("compare --out out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("no/run", "there is no training run in no/run: it has no checkpoint.pt"),
        ("nope", "unknown model 'nope': there are "),
        ("skipblocknet_xs", "say with --data on which images, since there is no training run among the models"),
        ("skipblocknet_xs skipblocknet_xs --data digits", "give each run or model once"),
        ("skipblocknet_xs@none.pt --data digits", "there is no file none.pt to take weights from"),
        (
            "skipblocknet_xs --data digits --layers bloks.1",
            "skipblocknet_xs: the model has no layer 'bloks.1'; similar",
        ),
        ("skipblocknet_xs --data svhn", "unknown data 'svhn': there are digits, "),
        ("skipblocknet_xs --data digits --image-size 16", "skipblocknet_xs cannot take images of 16 x 16"),
    ],
)
def test_diversity(fails: Fails, arguments: str, sentence: str) -> None:
    assert sentence in fails(f"diversity --out out {arguments}")
