"""``biasloss data pack`` and ``--data packed``, through the command line."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from biasloss_ext.cli import INTERRUPTED, main
from biasloss_ext.recipes import loop
from biasloss_ext.recipes.data import load_data
from biasloss_ext.recipes.data.packed import PackedData
from biasloss_ext.recipes.data.shards import Shard
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.recipe import Recipe, make_recipe
from tests.recipes.pictures import CLASSES, broken_files, write_folder
from tests.recipes.tiny import Fails, assert_same, build_small, checkpoint_of

CPU = torch.device("cpu")
SIZE = 56  # a test image is cut from 64 pixels
Command = Callable[..., None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command that has to end with a status, 0 by default, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(line: str, status: int = 0) -> None:
        monkeypatch.setattr("sys.argv", ["biasloss", *line.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == status

    return call


def write_photographs(parent: Path, images: int = 6) -> None:
    """Smooth images of several shapes, since resizing treats noise in its own way; one class is brighter."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = parent / split / name
            folder.mkdir(parents=True)
            for image in range(images):
                width, height = ((160, 96), (96, 160), (128, 128), (600, 100))[image % 4]
                coarse = generator.integers(0, 120, (height // 16, width // 16, 3)) + 100 * number
                smooth = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
                smooth.save(folder / f"{image}.png")


def recipe_of(kind: str, folder: str, **options: Any) -> Recipe:
    return make_recipe(kind, data_dir=folder, **{"image_size": SIZE, "batch_size": 4, **options})


def test_batches(kind: str, folder: str) -> tuple[Tensor, Tensor]:
    (batch,) = load_data(recipe_of(kind, folder), CPU).test_batches([torch.arange(12)])
    return batch


test_batches.__test__ = False  # type: ignore[attr-defined]


def train_batch(kind: str, folder: str, workers: int = 0) -> tuple[Tensor, Tensor]:
    (batch,) = load_data(recipe_of(kind, folder), CPU, workers).train_batches(1, [torch.arange(12).flip(0)])
    return batch


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_images_are_those_of_the_folder(command: Command, capsys: pytest.CaptureFixture[str], encoding: str) -> None:
    write_photographs(Path("data"))
    command(f"data pack data --out packed --side 64 --encoding {encoding}")
    assert "24 images of 2 classes in packed" in capsys.readouterr().out
    images, classes = test_batches("packed", "packed")
    expected, labels = test_batches("imagefolder", "data")
    assert torch.equal(classes, labels)
    if encoding == "raw":
        assert torch.equal(images, expected)  # packing resized them as the test images are resized
    else:
        assert (images - expected).abs().mean() < 0.05
    images, classes = train_batch("packed", "packed")
    expected, labels = train_batch("imagefolder", "data")
    assert torch.equal(classes, labels)
    # The same crops to within the rounding of their corners, of images that have fewer pixels.
    differences = (images - expected).abs().mean((1, 2, 3))
    others = (images - expected.roll(1, 0)).abs().mean((1, 2, 3))
    assert differences.max() < 0.15 < others.min()


def test_workers_give_the_same_images(command: Command) -> None:
    write_photographs(Path("data"))
    command("data pack data --out packed --side 64 --workers 1")
    alone, beside = train_batch("packed", "packed"), train_batch("packed", "packed", workers=2)
    assert all(map(torch.equal, alone, beside))


def test_shards_hold_all_images_and_their_names(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs(Path("data"))
    command("data pack data --out whole --side 300")
    monkeypatch.setattr("biasloss_ext.recipes.pack_command.MEGABYTE", 100_000)
    command("data pack data --out cut --side 300 --shard-size 1")
    listed = json.loads(Path("cut/packed.json").read_text())
    assert len(listed["train"]) > 2
    shards = [Shard(Path("cut") / entry["file"], entry["images"], 2) for entry in listed["train"]]
    names = [name for shard in shards for name in shard.names]
    assert names == sorted(str(path.relative_to("data")) for path in Path("data/train").rglob("*.png"))
    assert not any(shard.path.stat().st_size > 300_000 for shard in shards)
    assert all(map(torch.equal, train_batch("packed", "cut"), train_batch("packed", "whole")))
    # Images smaller than --side are stored as they are.
    assert np.array_equal(np.asarray(shards[0].whole(0)), np.asarray(Image.open("data/train/daisy/0.png")))
    again = pickle.loads(pickle.dumps(shards[1]))  # as for a worker process that is not forked
    assert np.array_equal(np.asarray(again.whole(0)), np.asarray(shards[1].whole(0)))
    assert len(pickle.dumps(shards[1])) < 1000


def test_a_training_resumes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", build_small)
    write_photographs(Path("data"))
    command("data pack data --out packed --side 64")
    options = "--data packed --data-dir packed --image-size 16 --batch-size 4 --workers 0 --loss ce --lr 0.01"
    options += " --epochs 2 --warmup-epochs 0 --checkpoint-steps 1"
    command(f"train {options} --out whole")
    monkeypatch.setattr(loop.Run, "take_step", interrupted_at_the_fifth(loop.Run.take_step))
    command(f"train {options} --out broken", status=INTERRUPTED)
    command(f"train {options} --out broken")
    assert_same(checkpoint_of(Path("broken"))["model"], checkpoint_of(Path("whole"))["model"])
    assert checkpoint_of(Path("whole"))["history"][-1]["test_accuracy"] == 1.0


def interrupted_at_the_fifth(take_step: Callable[..., None]) -> Callable[..., None]:
    """Of three steps an epoch."""
    steps = itertools.count(1)

    def step(run: loop.Run, *arguments: Any) -> None:
        if next(steps) == 5:
            raise KeyboardInterrupt
        take_step(run, *arguments)

    return step


def test_broken_files_are_listed(
    command: Command, fails: Fails, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(Path("data"), images=8)
    for name, (content, _) in broken_files().items():
        (Path("data/train/rose") / name).write_bytes(content)
    said = fails("data pack data --out packed")
    assert "cannot read the image data/train/rose/" in said
    assert "--skip-broken" in said
    command("data pack data --out packed --skip-broken")
    said = capsys.readouterr().out
    for name, (_, reason) in broken_files().items():
        assert re.search(rf"left out as broken: data/train/rose/{re.escape(name)}: .*{re.escape(reason)}", said)
    assert "32 images of 2 classes" in said
    data = load_data(recipe_of("packed", "packed"), CPU)
    assert (data.train_images, data.test_images) == (16, 16)
    # A training says so, and its report names each.
    monkeypatch.setattr(loop, "build_model", build_small)
    recipe = recipe_of("packed", "packed", epochs=1, image_size=16, loss="ce")
    train(recipe, Path("out"), device="cpu", display=Display(shown=False))
    report = Path("out/report.md").read_text()
    assert all(f"train/rose/{name}" in report for name in broken_files())


def test_a_class_needs_an_image(fails: Fails, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", images=1)
    (tmp_path / "data" / "val" / "rose" / "0.png").write_bytes(b"")
    assert "all images of the class rose are broken" in fails("data pack data --out packed --skip-broken")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("pack data --out data", "data exists already"),
        ("pack none --out packed", "none is no image folder"),
        ("pack data --out packed --side 0", "--side must be at least 1, got 0"),
        ("pack data --out packed --encoding png", "unknown encoding 'png': there are raw, jpeg"),
        ("pack data --out packed --encoding jpeg --quality 0", "--quality must be in [1, 100], got 0"),
        ("speed --data packed --data-dir data", "data is no packed data set: it has no packed.json"),
        ("speed --data packed --data-dir none", "none is no packed data set"),
    ],
)
def test_what_cannot_be_packed_or_read(fails: Fails, tmp_path: Path, options: str, sentence: str) -> None:
    write_folder(tmp_path / "data")
    assert sentence in fails(f"data {options}")


def test_a_packed_folder_is_no_image_folder(command: Command, fails: Fails) -> None:
    write_folder(Path("data"))
    command("data pack data --out packed")
    assert "packed is a packed data set: give it to --data packed" in fails(
        "data speed --data imagefolder --data-dir packed"
    )


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _listed(path: Path, **changes: Any) -> None:
    listed = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (listed | changes).items() if value is not None}))


SHARD, LIST = "train-00000.safetensors", "packed.json"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: (p / SHARD).unlink(), f"packed/{SHARD} is missing: pack the images again"),
    "short": (lambda p: _shorten(p / SHARD), f"packed/{SHARD} cannot be read as packed images"),
    "empty": (lambda p: (p / SHARD).write_bytes(b""), f"packed/{SHARD} cannot be read as packed images"),
    "no magic": (lambda p: (p / SHARD).write_bytes(b"x" * 500), f"packed/{SHARD} cannot be read as packed images"),
    "another count": (
        lambda p: shutil.copy(p / "test-00000.safetensors", p / SHARD),
        "offsets are torch.int64 (5,), expected torch.int64 (9,)",
    ),
    "list is no JSON": (lambda p: (p / LIST).write_text("{"), f"packed/{LIST} is broken"),
    "list is no object": (lambda p: (p / LIST).write_text("[]"), f"packed/{LIST} is broken"),
    "list lacks classes": (lambda p: _listed(p / LIST, class_names=None), "it lacks 'class_names'"),
    "list of another format": (lambda p: _listed(p / LIST, format="2"), "its format is '2', expected"),
    "list of numbers": (lambda p: _listed(p / LIST, train=[1]), f"packed/{LIST} is broken: 1 is no shard"),
    "fewer classes": (lambda p: _listed(p / LIST, class_names=["daisy"]), "a class is not below 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_shards_are_named(command: Command, fails: Fails, fault: str) -> None:
    write_folder(Path("data"), images=4)
    for extra in Path("data/val").rglob("[23].png"):
        extra.unlink()
    command("data pack data --out packed")
    change, sentence = FAULTS[fault]
    change(Path("packed"))
    assert sentence in fails("data speed --data packed --data-dir packed")


def with_tensor(path: Path, name: str, value: np.ndarray) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, "np") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, name: value}, path, metadata)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("sizes", np.full((8, 2), -1, np.int32), "an image has no pixels"),
        ("sizes", np.full((8, 2), 5, np.int32), "the bytes of an image do not fit its size"),
        ("sizes", np.full((8, 2), 5, np.int64), "sizes are torch.int64 (8, 2), expected torch.int32"),
        ("offsets", np.arange(9), "its images do not fill it"),
        ("classes", np.arange(8), "a class is not below 2"),
        ("names", np.frombuffer(b'["one"]', np.uint8), "it has 1 names of 8 images"),
        ("more", np.arange(9), "it has other tensors"),
    ],
)
def test_shards_that_contradict_themselves(
    command: Command, fails: Fails, name: str, value: np.ndarray, sentence: str
) -> None:
    write_folder(Path("data"), images=4)
    command("data pack data --out packed")
    with_tensor(Path("packed") / SHARD, name, value)
    assert sentence in fails("data speed --data packed --data-dir packed")


def test_a_broken_jpeg_in_a_shard_is_named(command: Command, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", build_small)
    write_folder(Path("data"), images=4)
    command("data pack data --out packed --encoding jpeg")
    data = load_data(recipe_of("packed", "packed"), CPU)
    assert isinstance(data, PackedData)
    shard, _ = data._train[3][0]
    path = Path("packed") / SHARD
    content = path.read_bytes()
    at = content.index(shard._bytes(3).tobytes())
    path.write_bytes(content[:at] + b"no image" + content[at + 8 :])
    options = "--image-size 16 --batch-size 8 --workers 0"
    said = fails(f"data speed --data packed --data-dir packed {options}")
    assert f"packed/{SHARD} is broken at train/daisy/3.png" in said


def test_speed_beside_the_folder(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "build_model", build_small)
    write_folder(Path("data"))
    command("data pack data --out packed --side 20")
    options = "--image-size 32 --batch-size 4 --loss ce --workers 0 --seconds 0.1"
    capsys.readouterr()
    command(f"data speed --data packed --data-dir packed --beside data {options}")
    said = capsys.readouterr().out
    assert re.search(r"data pipeline alone: \S+ images per second \(packed, 0 workers\)", said)
    assert re.search(
        r"data pipeline of data: \S+ images per second \(imagefolder, 0 workers\); packed has \S+ times", said
    )
    command(f"train --data packed --data-dir packed --epochs 1 {options.partition(' --seconds')[0]} --out out")
    assert "the packed images have 20 pixels at their shorter side" in capsys.readouterr().out


def test_a_full_disk_leaves_nothing(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "data")

    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in fails("data pack data --out packed")
