"""Image files as cameras, scanners and broken disks write them."""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from biasloss_ext.cli import main
from biasloss_ext.errors import UserError
from biasloss_ext.recipes import loop
from biasloss_ext.recipes.data import images as image_module
from biasloss_ext.recipes.data import sound
from biasloss_ext.recipes.data.folder import load_folder
from biasloss_ext.recipes.data.images import Preprocessing, problem_of, read_crop, read_image
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.processes import Processes
from biasloss_ext.recipes.recipe import Recipe, make_recipe
from tests.recipes.pictures import broken_files, encoded, write_folder
from tests.recipes.tiny import Fails, build_small


def gradient(dtype: type, top: int) -> np.ndarray:
    return np.linspace(0, top, 64).astype(dtype).reshape(8, 8)


@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "big-endian.tif"])
def test_sixteen_bits_keep_their_grays(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(gradient(np.uint16, 65535))
    if name == "big-endian.tif":
        image = Image.frombytes("I;16B", (8, 8), gradient(np.uint16, 65535).astype(">u2").tobytes())
    image.save(tmp_path / name)
    read = np.asarray(read_image(tmp_path / name))
    assert read.shape == (8, 8, 3)
    assert np.abs(read[..., 0].astype(int) - gradient(np.uint8, 255)).max() <= 1
    assert problem_of(tmp_path / name) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_kinds_of_eight_bits(tmp_path: Path, mode: str) -> None:
    color = np.stack([gradient(np.uint8, 255)] * 3, -1)
    ending = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    Image.fromarray(color).convert(mode).save(tmp_path / f"image.{ending}")
    read = read_image(tmp_path / f"image.{ending}")
    assert (read.mode, read.size) == ("RGB", (8, 8))
    tolerance = {"1": 255, "P": 51, "CMYK": 10, "YCbCr": 10}.get(mode, 0)
    assert np.abs(np.asarray(read).astype(int) - color).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255  # the corner above on the left
    # What a camera held that way writes down.
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    read = np.asarray(read_image(tmp_path / "photo.jpg")).astype(int)
    assert np.abs(read - pixels).max() < 30


def smooth(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(("size", "reduction"), [(24, 8), (40, 4), (180, 1), (300, 1)])
def test_a_part_of_a_photograph_is_decoded_no_larger_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, size: int, reduction: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    smooth(480, 320).save(path, exif=exif, quality=95)
    box = (16, 32, 16 + 192, 32 + 208)  # of the upright image
    expected = read_image(path).crop(box).resize((size, size), Image.Resampling.BILINEAR)
    asked, decoded = [], []
    upright = image_module._upright
    monkeypatch.setattr(image_module, "_upright", lambda image: decoded.append(max(image.size)) or upright(image))
    found = read_crop(path, lambda width, height: asked.append((width, height)) or box, size)
    assert asked == [(320, 480) if orientation == 6 else (480, 320)]
    assert decoded == [480 // reduction]
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean()
    assert difference < 6 if reduction > 1 else difference == 0


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_a_part_of_another_file_is_cut_out(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"image.{kind}"
    smooth(480, 320).save(path, exif=exif)
    box = (10, 20, 210, 320)
    expected = read_image(path).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
    assert read_crop(path, lambda width, height: box, 32) == expected


@pytest.mark.parametrize("name", broken_files())
def test_a_part_of_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(broken_files()[name][0])
    with pytest.raises(UserError, match=f"cannot read the image {tmp_path / name}: "):
        read_crop(tmp_path / name, lambda width, height: (0, 0, width, height), 16)


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    content, reason = broken_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read the image {path}: ") as raised:
        read_image(path)
    assert reason in str(raised.value)
    assert reason in (problem_of(path) or "readable")


def test_links_to_nowhere_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("link.png", "No such file"), ("folder.png", "Is a directory"), ("none.png", "No such file")):
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            read_image(tmp_path / name)


def test_preprocessing_takes_the_middle_at_any_size() -> None:
    prepare = Preprocessing(16, 20, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    flat = prepare(Image.new("RGB", (40, 30), (255, 127, 0)))
    assert flat.shape == (3, 16, 16)
    assert flat[:, 8, 8].tolist() == pytest.approx([1.0, (127 / 255 - 0.25) / 0.5, 0.0], abs=1e-6)
    for size in ((1, 1), (16, 16), (1, 40000), (40000, 1), (20, 300)):
        assert prepare(Image.new("L", size, 255)).shape == (3, 16, 16)
    halves = Image.new("RGB", (200, 20))
    halves.paste((255, 255, 255), (100, 0, 200, 20))
    columns = prepare(halves)[2, 8]
    assert columns[:7].max() == 0
    assert columns[9:].min() == 1
    assert Preprocessing.from_dict(prepare.as_dict()) == prepare
    older = {"grey" if name == "gray" else name: value for name, value in prepare.as_dict().items()}
    assert Preprocessing.from_dict(older) == prepare
    gray = Preprocessing(16, 16, (0.0,) * 3, (1.0,) * 3, gray=True)(Image.new("RGB", (16, 16), (255, 0, 0)))
    assert torch.equal(gray[0], gray[2])


def images_in(folder: Path, seed: int = 0) -> Recipe:
    return make_recipe("imagefolder", data_dir=str(folder), image_size=16, seed=seed)


def test_folder_data_is_augmented_by_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()  # hidden files are no class and no image
    (tmp_path / "train" / "rose" / "._0.png").write_bytes(b"")
    data = [load_folder(images_in(tmp_path, seed=3), torch.device("cpu"), workers) for workers in (0, 2)]
    assert data[0].class_names == ("daisy", "rose")
    assert (data[0].train_images, data[0].test_images) == (8, 8)
    batches = [torch.tensor([0, 5]), torch.tensor([6])]
    ones, others = (list(d.train_batches(1, batches)) for d in data)
    alone = next(iter(data[0].train_batches(1, [torch.tensor([5])])))
    for (images, classes), (same, same_classes) in zip(ones, others, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(classes, same_classes)
    assert torch.equal(alone[0][0], ones[0][0][1])
    assert not torch.equal(ones[0][0], next(iter(data[0].train_batches(2, batches)))[0])
    assert ones[0][1].tolist() == [0, 1]
    test, _ = next(iter(data[0].test_batches([torch.tensor([7])])))
    assert torch.equal(test[0], data[0].preprocessing.read(tmp_path / "val" / "rose" / "3.png"))


def test_a_file_that_breaks_during_training_is_named_from_a_worker(tmp_path: Path) -> None:
    data = load_folder(images_in(write_folder(tmp_path)), torch.device("cpu"), 1)
    (tmp_path / "train" / "rose" / "1.png").write_bytes(encoded(Image.new("L", (9, 9)), "PNG")[:40])
    with pytest.raises(UserError, match=r"^cannot read the image .*train/rose/1\.png: "):
        list(data.train_batches(0, [torch.arange(8)]))


@pytest.mark.parametrize(("terminal", "large"), [(True, 16), (True, 17), (False, 16)])
def test_a_bar_counts_the_images_of_a_large_folder_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, large: int
) -> None:
    printed = io.StringIO()
    console = functools.partial(Console, file=printed, force_terminal=terminal, width=80)
    monkeypatch.setattr("biasloss_ext.recipes.display.Console", console)
    monkeypatch.setattr(sound, "LARGE", large)
    data = load_folder(images_in(write_folder(tmp_path)), torch.device("cpu"), 0)
    (tmp_path / "val" / "rose" / "3.png").write_bytes(b"")
    with Display() as display, pytest.raises(UserError, match=r"rose/3\.png: it is not an image;"):
        sound.check_images(data, Processes(torch.device("cpu")), display=display)
    if not terminal:
        assert printed.getvalue() == ""
        return
    for part in ("reading every image", "0/16", "16/16"):
        assert (part in printed.getvalue()) == (large == 16)


def test_all_kinds_of_files_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes, black and white, told apart whatever the files are."""
    monkeypatch.setattr(loop, "build_model", build_small)
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "val"):
        for name, value in (("black", 0), ("white", 255)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            image = Image.new("RGB", (40, 24), (value,) * 3)
            image.convert("CMYK").save(folder / "cmyk.jpg")
            image.convert("P").save(folder / "palette.png")
            image.save(folder / "rotated.jpg", exif=exif)
            Image.fromarray(np.full((24, 40), 257 * value, np.uint16)).save(folder / "sixteen.png")
    recipe = make_recipe("imagefolder", data_dir=str(tmp_path / "data"), image_size=16, epochs=4, batch_size=8)
    recipe = dataclasses.replace(recipe, loss="ce", lr=0.01, warmup_epochs=0)
    outcome = train(recipe, tmp_path / "out", device="cpu", display=Display(shown=False))
    assert outcome.accuracy == 1.0


def test_data_check_lists_every_broken_file(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["biasloss", "data", "check", "data"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == "all 16 image files in data can be read\n"
    for name, (content, _) in broken_files().items():
        (tmp_path / "data" / "val" / "rose" / name).write_bytes(content)
    printed: list[str] = []
    monkeypatch.setattr("biasloss_ext.recipes.check_command.typer.echo", printed.append)
    count = len(broken_files())
    assert f"{count} of {16 + count} image files in data cannot be read: repair" in fails("data check data")
    assert len(printed) == count
    for name, (_, reason) in broken_files().items():
        assert any(line.startswith(f"data/val/rose/{name}: ") and reason in line for line in printed)


def test_data_check_shows_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    console = functools.partial(Console, file=printed, force_terminal=True, width=80)
    monkeypatch.setattr("biasloss_ext.recipes.display.Console", console)
    monkeypatch.setattr("sys.argv", ["biasloss", "data", "check", str(write_folder(tmp_path))])
    with pytest.raises(SystemExit):
        main()
    assert "16/16" in printed.getvalue()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("check", "Missing argument 'DIR'"),
        ("check none", "there is no folder none"),
        ("check empty", "there is no image in the folder empty"),
        ("chekc .", "No such command 'chekc'"),
    ],
)
def test_data_check_errors(fails: Fails, tmp_path: Path, arguments: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    assert sentence in fails(f"data {arguments}")
