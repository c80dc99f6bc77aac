"""Fixed subsets of the training images, and wrong labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.subset import stratified, with_noise
from biasloss_ext.recipes.processes import Processes
from biasloss_ext.recipes.recipe import make_recipe
from biasloss_ext.recipes.run_data import RunData, open_data
from tests.recipes.idx_files import write_idx
from tests.recipes.pictures import write_folder
from tests.recipes.tiny import Fails, Interrupting, checkpoint_of, run, use_linear_model, write_cifar

CPU = Processes(torch.device("cpu"))


def opened(data: str, folder: Path | None = None, **options: Any) -> RunData:
    recipe = make_recipe(data, data_dir=None if folder is None else str(folder), **options)
    return open_data(recipe, CPU, workers=0)


@pytest.mark.parametrize("images", [4, 5, 40, 100, 399, 400])
def test_a_subset_has_every_class_in_its_proportion(images: int) -> None:
    classes = torch.tensor([0] * 200 + [1] * 120 + [2] * 79 + [3])[torch.randperm(400)]
    chosen = stratified(classes, images, seed=0)
    assert len(chosen.unique()) == images
    assert chosen.tolist() == sorted(chosen.tolist())
    counts = classes[chosen].bincount(minlength=4)
    assert counts.min() >= 1
    expected = (images - 1) * torch.tensor([200, 120, 79]) / 399  # the last class has a single image
    assert (counts[:3] - expected).abs().max() <= 1
    assert set(chosen.tolist()) <= set(stratified(classes, min(400, images + 30), seed=0).tolist())


def test_a_subset_hangs_on_the_seed_alone() -> None:
    classes = torch.arange(1000) % 10
    torch.manual_seed(1)
    first = stratified(classes, 100, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first, stratified(classes, 100, seed=0))
    other = stratified(classes, 100, seed=1)
    assert len(set(first.tolist()) & set(other.tolist())) < 40
    assert len(set((first % 100 // 10).tolist())) == 10  # from all over the data


def test_noise_replaces_exactly_a_share_by_any_other_class() -> None:
    classes = torch.arange(3000) % 3
    noisy = with_noise(classes, 3, 0.3, seed=0)
    changed = noisy != classes
    assert int(changed.sum()) == 900
    assert (noisy.min(), noisy.max()) == (0, 2)
    moves = (3 * classes + noisy)[changed].bincount(minlength=9)
    assert [move for move, count in enumerate(moves.tolist()) if count > 100] == [1, 2, 3, 5, 6, 7]
    assert torch.equal(noisy, with_noise(classes, 3, 0.3, seed=0))
    assert not torch.equal(noisy, with_noise(classes, 3, 0.3, seed=1))
    more = with_noise(classes, 3, 0.5, seed=0)
    assert torch.equal(more[changed], noisy[changed])


@pytest.mark.parametrize("data", ["digits", "cifar10", "mnist", "imagefolder"])
def test_every_data_set_is_cut_and_its_test_images_stay(tmp_path: Path, data: str) -> None:
    writers = {"cifar10": write_cifar, "mnist": write_idx, "imagefolder": lambda folder: write_folder(folder, images=8)}
    if data in writers:
        writers[data](tmp_path)
    options: dict[str, Any] = {} if data != "imagefolder" else {"image_size": 16}
    whole, clean, noisy = (
        opened(data, tmp_path, **options, **more)
        for more in ({}, {"train_images": 12}, {"train_images": 12, "label_noise": 0.25})
    )
    available = whole.data.train_images
    assert (clean.data.train_images, noisy.data.train_images) == (12, 12)
    assert int((noisy.data.train_classes != clean.data.train_classes).sum()) == 3
    assert noisy.described == whole.described
    assert clean.notes == [f"training on 12 of {available} images (--train-images)"]
    assert noisy.notes == [*clean.notes, "3 of 12 training labels are wrong on purpose (--label-noise)"]
    indices = stratified(whole.data.train_classes, 12, seed=0)
    for cut in (clean, noisy):
        _, classes = next(iter(cut.data.train_batches(0, [torch.arange(12)])))
        assert torch.equal(classes.cpu(), cut.data.train_classes)
    assert torch.equal(clean.data.train_classes, whole.data.train_classes[indices])
    tests = [next(iter(each.data.test_batches([torch.arange(8)]))) for each in (whole, noisy)]
    assert torch.equal(tests[0][0], tests[1][0])
    assert torch.equal(tests[0][1], tests[1][1])


def test_batches_hold_the_chosen_images(tmp_path: Path) -> None:
    write_idx(tmp_path, train_images=200)
    whole, cut = opened("mnist", tmp_path).data, opened("mnist", tmp_path, train_images=50).data
    indices = stratified(whole.train_classes, 50, seed=0)
    # A crop moves an image within its black border: the mean stays, and tells the images apart.
    images, _ = next(iter(cut.train_batches(0, [torch.arange(50)])))
    every, _ = next(iter(whole.train_batches(0, [torch.arange(200)])))
    distances = (images.double().mean((1, 2, 3))[:, None] - every.double().mean((1, 2, 3))).abs()
    assert torch.equal(distances.argmin(1), indices)


def test_a_run_goes_on_with_the_same_subset_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_linear_model(monkeypatch)
    data, out = write_cifar(tmp_path / "data"), tmp_path / "out"
    cut: dict[str, Any] = {"train_images": 64, "label_noise": 0.25}
    with pytest.raises(KeyboardInterrupt):
        run(data, out, Interrupting(3), checkpoint_steps=1, **cut)
    saved = checkpoint_of(out)["recipe"]
    assert (saved["train_images"], saved["label_noise"]) == (64, 0.25)
    for other, sentence in (
        ({"train_images": 48}, r"is of another run \(train images 64 there, 48 here\)"),
        ({"label_noise": 0.0}, r"is of another run \(label noise 0.25 there, 0.0 here\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(data, out, **{**cut, **other})
    outcome = run(data, out, **cut)
    assert len(outcome.history) == 2
    report = (out / "report.md").read_text()
    assert "| train images | 64 |" in report
    assert "| label noise | 0.25 |" in report


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "--train-images 1438",
            "--train-images must be from 10, one image of each class, to 1437, all of digits, got 1438",
        ),
        ("--train-images 9", "--train-images must be from 10, one image of each class, to 1437, all of digits, got 9"),
        ("--train-images=-1", "train images must be at least 0, got -1"),
        ("--train-images 50", "the batch size is 64, but there are 50 training images"),
        ("--label-noise 1", "label noise must be in [0, 1), got 1.0"),
        ("--label-noise=-0.1", "label noise must be in [0, 1), got -0.1"),
        ("--label-noise nan", "label noise must be in [0, 1), got nan"),
        ("--train-images some", "Invalid value for '--train-images': "),
    ],
)
def test_options(fails: Fails, options: str, sentence: str) -> None:
    assert sentence in fails(f"train --out out {options}")
    assert sentence in fails(f"compare --models skipblocknet_xs --out out {options}")
