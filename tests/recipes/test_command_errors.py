"""What the user got wrong: one sentence with the valid choices, exit code 2, nothing half-written."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from biasloss_ext.recipes import loop, run_data
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.optional import why_not
from biasloss_ext.recipes.recipe import make_recipe
from tests.recipes.pictures import CLASSES, broken_files, write_folder
from tests.recipes.tiny import Fails, build_small, run, write_cifar


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--data svhn", "unknown data 'svhn': there are digits, cifar10, cifar100, mnist, fashion_mnist, kmnist, "),
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
        ("--schedule linear", "unknown schedule 'linear': there are step, cosine"),
        ("--gamma=-1", "gamma must be above 0, got -1.0"),
        ("--gamma nan", "gamma must be above 0, got nan"),
        ("--milestones=-1,5", "milestones must be epochs from 0 on, got (-1, 5)"),
        ("--ema-decay 1", "ema decay must be in [0, 1), got 1.0"),
        ("--momentum 1.5", "momentum must be in [0, 1], got 1.5"),
        ("--weight-decay=-1e-4", "weight decay must be at least 0, got -0.0001"),
        ("--alpha nan", "alpha must be at least 0, got nan"),
        ("--focal-gamma inf", "focal gamma must be at least 0, got inf"),
        ("--warmup-epochs=-1", "warmup epochs must be at least 0, got -1"),
        ("--mixup=-0.2", "mixup must be at least 0, got -0.2"),
        ("--cutmix nan", "cutmix must be at least 0, got nan"),
        ("--lr nan", "lr must be above 0, got nan"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--batch-size 0", "batch size must be at least 1, got 0"),
        ("--accumulate 0", "accumulate must be at least 1, got 0"),
        ("--image-size=-32", "image size must be at least 1, got -32"),
        ("--image-size 100000", "digits of 100000 x 100000 take 197670 GB of memory, this machine has"),
        ("--seed=-1", "seed must be at least 0, got -1"),
        ("--seed 9223372036854775808", "seed must be below 2^63, got 9223372036854775808"),
        ("--epochs ten", "Invalid value for '--epochs': "),
        ("--lr fast", "Invalid value for '--lr': "),
        ("--workers=-1", "Invalid value for '--workers': "),
        ("--checkpoint-steps=-1", "Invalid value for '--checkpoint-steps': "),
        ("--learning-rate 1", "No such option: --learning-rate"),
        ("--lr", "Option '--lr' requires an argument"),
        ("digits", "(digits)"),
        ("--weights .", "there is no file . to take weights from"),
        ("--data cifar10 --data-dir .", "no CIFAR-10 in .: data_batch_1, data_batch_2, "),
        (
            "--device cpu --sync-batchnorm",
            "batch normalization over all processes (--sync-batchnorm) runs on GPUs only",
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_model", build_small)
        run(write_cifar(tmp_path / "data"), tmp_path / "done", epochs=1, loss="ce")
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


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("trian --out out", "No such command 'trian'"),
        ("info more", "(more)"),
        ("predict --run out", "Missing argument 'IMAGES...'"),
        ("predict x.png", "Missing option '--run'"),
        ("predict --run none x.png", "there is no training run in none: it has no checkpoint.pt"),
        ("predict --run . --top-k 0 x.png", "Invalid value for '--top-k': "),
        ("predict --run . --batch-size 0 x.png", "Invalid value for '--batch-size': "),
        ("predict --run . --csv no/out.csv x.png", "there is no folder no to write out.csv into"),
        ("diversity", "Missing argument 'MODEL...'"),
        ("bench --ops none --out out", "--ops has none; there are batch_norm, "),
        ("bench --device tpu --out out", "--device must be auto, cpu or cuda, got tpu"),
        ("bench --compare a.json b.json", "a.json"),
    ],
)
def test_other_commands(fails: Fails, command: str, sentence: str) -> None:
    assert sentence in fails(command)


def _no_class(data: Path) -> None:
    for split in ("train", "val"):
        for name in CLASSES:
            shutil.rmtree(data / split / name)


def _one_class(data: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(data / split / "rose")


def _remove_all(*names: str) -> Callable[[Path], None]:
    def remove(data: Path) -> None:
        for name in names:
            for path in (data / name).iterdir():
                path.unlink()

    return remove


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(data: Path) -> None:
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(content)

    return write


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no class": (_no_class, "data/train has no class: a classifier needs two or more, each a folder with its images"),
    "one class": (_one_class, "data/train has one class, daisy: a classifier needs two or more"),
    "a class without images": (_remove_all("train/rose"), "there is no image in data/train/rose: every class needs"),
    "a class without test images": (_remove_all("val/rose"), "there is no image in data/val/rose"),
    "a class more in train": (
        _write("train/tulip/0.png", b""),
        "the classes of data/train and data/val differ: tulip",
    ),
    "no train": (
        lambda data: shutil.rmtree(data / "train"),
        "data is no image folder: expected data/train/CLASS/IMAGE",
    ),
    "no val": (lambda data: shutil.rmtree(data / "val"), "and data/val/CLASS/IMAGE (or test for val)"),
    "other files alone": (
        lambda data: [path.rename(path.with_suffix(".gif")) for path in (data / "train" / "rose").iterdir()],
        "there is no image in data/train/rose: every class needs some, as .jpg, .png or the like",
    ),
    **{
        f"{name} in {split}": (
            _write(f"{split}/rose/{name}", content),
            f"cannot read the image data/{split}/rose/{name}: ",
        )
        for split, files in (("train", ("huge.png", "header.ppm")), ("val", ("short.jpg", "empty.jpg", "float.tif")))
        for name, (content, _) in broken_files().items()
        if name in files
    },
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_image_folders(fails: Fails, tmp_path: Path, kind: str) -> None:
    alter, sentence = FOLDERS[kind]
    alter(write_folder(tmp_path / "data"))
    options = "--data imagefolder --data-dir data --model skipblocknet_xs --image-size 32 --batch-size 4"
    assert sentence in fails(f"train --out out {options}")


def test_predict(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", build_small)
    monkeypatch.setattr("biasloss_ext.recipes.trained.build_model", build_small)
    write_folder(tmp_path / "data")
    recipe = {"image_size": 16, "epochs": 1, "batch_size": 4, "loss": "ce"}
    train(make_recipe("imagefolder", data_dir=str(tmp_path / "data"), **recipe), tmp_path / "run", device="cpu")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.png").write_bytes(b"")
    image = "data/val/rose/0.png"
    for options, sentence in (
        ("nowhere.png", "there is no file or folder nowhere.png"),
        ("nothing", "there is no image in the folder nothing"),
        (
            f"{image} broken.png",
            "cannot read the image broken.png: it is not an image; leave such files out with --skip",
        ),
        (f"{image} --top-k 3", "--top-k must be at most 2, the number of classes of run, got 3"),
        (f"{image} --csv nothing", "cannot write nothing: Is a directory"),
        (f"{image} --device tpu", "unknown device 'tpu': there are auto, cpu, cuda"),
    ):
        assert sentence in fails(f"predict --run run {options}")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["data"].pop("class_names")
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert "run/checkpoint.pt was written by an older version, without class names" in fails(
        f"predict --run run {image}"
    )


def test_not_enough_memory(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), _allocation_error()):

        def raises(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(run_data, "load_data", raises)
        assert "out of memory: try a smaller --batch-size or --image-size" in fails("train --out out")


def _allocation_error() -> RuntimeError:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError


def test_torchrun_repeats_the_sentence(fails: Fails, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("torchrun") / "error.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        said = fails("train --out out --gamma=-1")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message == f"biasloss: {said.strip()}"


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
