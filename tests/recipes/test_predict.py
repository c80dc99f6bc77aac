"""``biasloss predict``: image files classified as the run classified its test images."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from biasloss_ext.cli import main
from biasloss_ext.recipes import loop
from biasloss_ext.recipes.data import load_data
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.predict import predict
from biasloss_ext.recipes.recipe import make_recipe
from biasloss_ext.recipes.trained import load_trained
from tests.recipes.pictures import huge_png, write_folder
from tests.recipes.tiny import build_small, write_cifar


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", build_small)
    monkeypatch.setattr("biasloss_ext.recipes.trained.build_model", build_small)
    monkeypatch.setattr(loop, "write_report", lambda outcome: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on bright and dark images, in a folder beside them."""
    recipe = make_recipe(
        "imagefolder",
        data_dir=str(write_folder(tmp_path / "data")),
        **{"image_size": 16, "epochs": 10, "batch_size": 4, "loss": "ce", "warmup_epochs": 0, "lr": 0.02},
        ema_decay=0.5,
    )
    train(recipe, tmp_path / "run", device="cpu", display=Display(shown=False))
    return tmp_path / "run"


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, command: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["biasloss", "predict", *command.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def test_predicts_what_the_run_s_evaluation_computes(run: Path, tmp_path: Path) -> None:
    recipe = make_recipe("imagefolder", data_dir=str(tmp_path / "data"), image_size=16)
    images, classes = next(iter(load_data(recipe, torch.device("cpu")).test_batches([torch.arange(8)])))
    model = load_trained(run)
    assert model.class_names == ("daisy", "rose")
    expected = model(images).softmax(1)
    predictions = predict(run, [tmp_path / "data" / "val"], top_k=2, batch_size=3, device="cpu").found
    assert len(predictions) == 8
    for row, prediction, number in zip(expected.tolist(), predictions, classes.tolist(), strict=True):
        assert prediction.file.parent.name == model.class_names[number]
        assert dict(zip(prediction.classes, prediction.probabilities, strict=True)) == pytest.approx(
            dict(zip(model.class_names, row, strict=True)), rel=1e-5
        )
        assert prediction.probabilities[0] >= prediction.probabilities[1]
    single = model(model.preprocessing.read(predictions[0].file)[None]).softmax(1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(single[0], expected[0])


def test_table(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more").mkdir()
    for source, target in (("daisy", "dark.jpg"), ("rose", "more/bright.tif"), ("rose", "more/upper.PNG")):
        Image.open(tmp_path / "data" / "val" / source / "0.png").save(tmp_path / target)
    (tmp_path / "more" / "notes.txt").write_text("no image")
    call(monkeypatch, tmp_path, "--run run dark.jpg more more/upper.PNG --device cpu")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["file", "class", "probability"]
    assert [line[:2] for line in lines[1:]] == [
        ["dark.jpg", "daisy"],
        ["more/bright.tif", "rose"],
        ["more/upper.PNG", "rose"],
    ]
    assert all(50 <= float(line[2].removesuffix("%")) <= 100 for line in lines[1:])


def test_csv_top_classes_and_broken_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "val" / "rose" / "1.png").write_bytes(huge_png())
    options = "--top-k 2 --skip-broken --batch-size 2 --workers 0 --device cpu"
    call(monkeypatch, tmp_path, f"--run run data/val --csv found.csv {options}")
    said = capsys.readouterr()
    assert said.out == "7 images classified, in found.csv\n"
    assert said.err.startswith("left out: cannot read the image data/val/rose/1.png: ")
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert list(rows[0]) == ["file", "rank", "class", "probability"]
    assert [row["rank"] for row in rows] == ["1", "2"] * 7
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["file"] == second["file"]
        assert float(first["probability"]) + float(second["probability"]) == pytest.approx(1, abs=1e-5)
        assert float(first["probability"]) >= float(second["probability"])


def test_runs_on_other_data(tmp_path: Path) -> None:
    """CIFAR by its class names; digits without color."""
    cifar = make_recipe(
        "cifar10", data_dir=str(write_cifar(tmp_path / "data")), epochs=1, batch_size=16, loss="ce", small_input=False
    )
    train(cifar, tmp_path / "cifar", device="cpu", display=Display(shown=False))
    images, _ = next(iter(load_data(cifar, torch.device("cpu")).test_batches([torch.arange(2)])))
    scaled = images * torch.tensor((0.2470, 0.2435, 0.2616)).view(-1, 1, 1) + torch.tensor(
        (0.4914, 0.4822, 0.4465)
    ).view(-1, 1, 1)
    Image.fromarray((255 * scaled[1]).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    model = load_trained(tmp_path / "cifar")
    torch.testing.assert_close(model.preprocessing.read(tmp_path / "one.png"), images[1], atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    cifar_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert model.class_names == tuple(cifar_names)
    (prediction,) = predict(tmp_path / "cifar", [tmp_path / "one.png"], top_k=10, device="cpu").found
    assert set(prediction.classes) == set(cifar_names)
    digits = make_recipe("digits", epochs=1, loss="ce", warmup_epochs=0)
    train(digits, tmp_path / "digits", device="cpu", display=Display(shown=False))
    prepared = load_trained(tmp_path / "digits").preprocessing.read(tmp_path / "one.png")  # type: ignore[union-attr]
    assert torch.equal(prepared[0], prepared[2])
    assert predict(tmp_path / "digits", [tmp_path / "one.png"], device="cpu").found[0].classes[0] in "0123456789"
