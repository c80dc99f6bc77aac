"""Options that people train compact networks with, each beside Bias Loss."""

from __future__ import annotations

import copy
import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext import functional
from biasloss_ext.errors import UserError
from biasloss_ext.recipes.losses import build_loss
from biasloss_ext.recipes.optional import why_not
from biasloss_ext.recipes.recipe import Recipe, make_recipe
from biasloss_ext.recipes.run_data import open_data
from biasloss_ext.recipes.schedule import build_optimizer, restore_optimizer
from biasloss_ext.recipes.weights import load_weights
from tests.recipes.pictures import write_folder
from tests.recipes.test_subset import CPU, opened
from tests.recipes.tiny import (
    Fails,
    Interrupting,
    LinearModel,
    assert_same,
    build_small,
    checkpoint_of,
    run,
    use_linear_model,
    write_cifar,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("data"))


def rmsprop_by_hand(weight: Tensor, gradients: list[Tensor], recipe: Recipe) -> Tensor:
    square, step = torch.zeros_like(weight), torch.zeros_like(weight)
    for gradient in gradients:
        square = recipe.rms_decay * square + (1 - recipe.rms_decay) * gradient**2
        step = recipe.momentum * step + gradient / (square.sqrt() + recipe.epsilon)
        weight = weight - recipe.lr * step
    return weight


def test_rmsprop_takes_its_constants() -> None:
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.8, "rms_decay": 0.7, "epsilon": 0.03, "weight_decay": 0.0}
    recipe = make_recipe("digits", optimizer="rmsprop", **options)
    model = nn.Linear(3, 2, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = build_optimizer(recipe, model)
    gradients = [torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    for gradient in gradients:
        model.weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), rmsprop_by_hand(before, gradients, recipe))


def test_epsilon_reaches_adamw() -> None:
    optimizer = build_optimizer(make_recipe("digits", epsilon=0.03), nn.Linear(2, 2))
    assert optimizer.param_groups[0]["eps"] == 0.03


@pytest.mark.parametrize("kind", ["adamw", "sgd", "rmsprop"])
def test_a_state_of_another_memory_format_is_restored(kind: str) -> None:
    """The next step is that of the run which was saved; fused optimizers of PyTorch would read the moments in another order."""
    recipe = make_recipe("digits", optimizer=kind)
    saved, restored = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    gradients = [torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)]

    def step(model: nn.Conv2d, optimizer: torch.optim.Optimizer, gradient: Tensor) -> None:
        model.weight.grad = torch.empty_like(model.weight).copy_(gradient)
        optimizer.step()

    first, second = build_optimizer(recipe, saved), build_optimizer(recipe, restored)
    step(saved, first, gradients[0])
    restored.load_state_dict(saved.state_dict())
    restore_optimizer(second, copy.deepcopy(first.state_dict()))
    step(saved, first, gradients[1])
    step(restored, second, gradients[1])
    torch.testing.assert_close(restored.weight, saved.weight)


def samples(classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(12, generator=generator) + 0.1,
        torch.randn(12, classes, generator=generator, requires_grad=True),
        torch.randint(classes, (12,), generator=generator),
    )


@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("mixed", [False, True])
def test_bce_is_weighted_as_bias_loss_weighs(mode: str, mixed: bool) -> None:
    recipe = make_recipe("digits", bce=True, normalisation_mode=mode, alpha=0.5, beta=0.2, label_smoothing=0.1)
    loss = build_loss(recipe)
    variance, scores, target = samples()
    running_min = torch.tensor(torch.inf)
    for factor in (1.0, 2.0):  # at the second step the running minimum is below the batch's
        given = target
        expected_target = F.one_hot(target, 5).double()
        if mixed:
            given = 0.7 * F.one_hot(target, 5).float() + 0.3 * F.one_hot(target.flip(0), 5).float()
            expected_target = given.double()
        value, weights = loss((factor * variance, scores), given)
        (gradient,) = torch.autograd.grad(value, scores)
        reference = scores.detach().double().requires_grad_()
        expected_weights = functional.bias_weight(
            (factor * variance).double(), running_min.double() if mode == "global" else None, alpha=0.5, beta=0.2
        )
        smooth = 0.9 * expected_target + 0.1 / 5
        each = -(smooth * F.logsigmoid(reference) + (1 - smooth) * F.logsigmoid(-reference)).mean(1)
        expected = (expected_weights * each).mean()
        (expected_gradient,) = torch.autograd.grad(expected, reference)
        torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)
        running_min = torch.minimum(running_min, (factor * variance).min())
    assert loss.state_dict()["loss.running_min"] == (running_min if mode == "global" else torch.inf)


def test_bce_without_bias_loss() -> None:
    value, weights = build_loss(make_recipe("digits", loss="ce", bce=True))(samples()[1], samples()[2])
    expected = F.binary_cross_entropy_with_logits(samples()[1], F.one_hot(samples()[2], 5).float())
    torch.testing.assert_close(value, expected)
    assert weights is None


@pytest.mark.parametrize("bce", [False, True])
def test_mean_weight_one_divides_by_the_mean_of_the_weights(bce: bool) -> None:
    variance, scores, target = samples()
    plain, weights = build_loss(make_recipe("digits", bce=bce))((variance, scores), target)
    (gradient,) = torch.autograd.grad(plain, scores)
    value, divided = build_loss(make_recipe("digits", bce=bce, mean_weight_one=True))((variance, scores), target)
    (divided_gradient,) = torch.autograd.grad(value, scores)
    assert weights.mean() < 0.95
    torch.testing.assert_close(divided, weights / weights.mean())
    torch.testing.assert_close(value, plain / weights.mean())
    torch.testing.assert_close(divided_gradient, gradient / weights.mean())


def test_test_every_tests_some_epochs_and_the_last(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_linear_model(monkeypatch)
    every = run(data, tmp_path / "every", epochs=5)
    some = run(data, tmp_path / "some", epochs=5, test_every=2, ema_decay=0.5)
    tested = [row["epoch"] for row in some.history if "test_accuracy" in row]
    assert tested == [row["epoch"] for row in some.history if "ema_test_accuracy" in row] == [2, 4, 5]
    assert some.history[-1]["test_loss"] == every.history[-1]["test_loss"]
    rows = list(csv.DictReader((tmp_path / "some" / "metrics.csv").open()))
    assert [row["test_accuracy"] == "" for row in rows] == [True, False, True, False, False]
    assert f"**{some.accuracy:.2%}**" in (tmp_path / "some" / "report.md").read_text()


OPTIONS: dict[str, dict[str, Any]] = {
    "rmsprop": {"optimizer": "rmsprop", "epsilon": 0.03, "lr": 0.001},
    "bce": {"bce": True},
    "mean_weight_one": {"mean_weight_one": True, "test_every": 2},
    "rand_augment": {"rand_augment": 9},
    "random_erasing": {"random_erasing": 0.5},
}


def without_torchvision(option: str) -> str | None:
    return why_not("torchvision") if option in ("rand_augment", "random_erasing") else None


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_with_it_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    if reason := without_torchvision(option):
        pytest.skip(reason)
    use_linear_model(monkeypatch)
    monkeypatch.setattr("biasloss_ext.recipes.loop.write_report", lambda _: None)
    whole = run(data, tmp_path / "whole", **OPTIONS[option])
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "broken", Interrupting(3), checkpoint_steps=1, **OPTIONS[option])
    run(data, tmp_path / "broken", **OPTIONS[option])
    assert_same(checkpoint_of(tmp_path / "broken"), checkpoint_of(tmp_path / "whole"))
    assert whole.history[0]["train_loss"] != run(data, tmp_path / "plain").history[0]["train_loss"]


@pytest.mark.parametrize("option", ["rand_augment", "random_erasing"])
@pytest.mark.parametrize("kind", ["cifar10", "imagefolder"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path: Path, kind: str, option: str) -> None:
    if reason := without_torchvision(option):
        pytest.skip(reason)
    more: dict[str, Any] = {} if kind == "cifar10" else {"image_size": 16}
    folder = write_cifar(tmp_path) if kind == "cifar10" else write_folder(tmp_path)
    plain = opened(kind, folder, **more).data
    changed = [opened(kind, folder, **more, **OPTIONS[option]).data for _ in range(2)]
    alone, together = torch.tensor([5]), torch.arange(8)
    torch.manual_seed(0)
    ((first, _),) = changed[0].train_batches(1, [together])
    torch.manual_seed(1)
    ((second, _),) = changed[1].train_batches(1, [alone])
    assert torch.equal(first[5], second[0])
    ((other_epoch, _),) = changed[0].train_batches(2, [together])
    assert not torch.equal(first[5], other_epoch[5])
    ((without, _),) = plain.train_batches(1, [together])
    differing = (first != without).flatten(1).any(1)
    assert differing.any()
    if option == "random_erasing":
        erased = first != without
        assert (first[erased] == 0).all()
        assert 0 < erased.float().mean() < 0.5
        assert not torch.equal(first == 0, other_epoch == 0)
    for each in (plain, changed[0]):
        assert each.test_images == plain.test_images
    tests = [next(iter(each.test_batches([torch.arange(4)])))[0] for each in (plain, changed[0])]
    assert torch.equal(*tests)


@pytest.mark.parametrize(
    ("flag", "title"), [("rand-augment 9", "RandAugment"), ("random-erasing 0.2", "random erasing")]
)
def test_augmentation_without_torchvision(fails: Fails, flag: str, title: str) -> None:
    reason = why_not("torchvision")
    if reason is None:
        pytest.skip("torchvision can be imported")
    name = flag.split()[0]
    assert f"{title} (--{name}) needs torchvision, but {reason}" in fails(f"train --out out --{flag}")


@pytest.fixture
def teacher(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model is linear, as are its students."""
    use_linear_model(monkeypatch)

    def loaded(recipe: Recipe, *_: Any, **__: Any) -> nn.Module:
        model = LinearModel(with_features=False)
        load_weights(model, Path(str(recipe.weights)), "linear")
        return model

    monkeypatch.setattr("biasloss_ext.recipes.trained.build_model", loaded)
    monkeypatch.setattr("biasloss_ext.recipes.loop.write_report", lambda _: None)
    run(data, tmp_path / "teacher", epochs=1, loss="ce", seed=5)
    return tmp_path / "teacher"


def test_a_student_computes_what_a_loop_by_hand_computes(data: Path, tmp_path: Path, teacher: Path) -> None:
    options: dict[str, Any] = {"teacher": str(teacher), "distill_weight": 0.3, "distill_temperature": 2.0}
    options |= {"epochs": 1, "batch_size": 80, "momentum": 0.0, "weight_decay": 0.0, "milestones": ()}
    run(data, tmp_path / "out", **options)
    images, target = next(iter(opened("cifar10", data).data.train_batches(0, [torch.arange(80)])))
    torch.manual_seed(0)
    student, model = LinearModel(True).double(), LinearModel(False).double()
    model.load_state_dict(checkpoint_of(teacher)["model"])
    features, scores = student(images.double())
    weights = functional.bias_weight(features.var(1))
    log_ours, theirs = (scores / 2).log_softmax(1), (model(images.double()) / 2).softmax(1)
    divergence = (theirs * (theirs.log() - log_ours)).sum(1).mean() * 4
    loss = 0.7 * (weights * F.cross_entropy(scores, target, reduction="none")).mean() + 0.3 * divergence
    loss.backward()
    trained = checkpoint_of(tmp_path / "out")["model"]
    for name, parameter in student.named_parameters():
        expected = parameter.detach() - 0.05 * parameter.grad  # type: ignore[operator]
        torch.testing.assert_close(trained[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_student_goes_on_with_the_same_teacher_alone(data: Path, tmp_path: Path, teacher: Path) -> None:
    options: dict[str, Any] = {"teacher": str(teacher)}
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "broken", Interrupting(3), checkpoint_steps=1, **options)
    kept = (teacher / "checkpoint.pt").read_bytes()
    run(data, teacher, epochs=1, loss="ce", seed=6, fresh=True)
    with pytest.raises(UserError, match="the teacher was trained again since this run began: restore its checkpoint"):
        run(data, tmp_path / "broken", **options)
    (teacher / "checkpoint.pt").write_bytes(kept)
    run(data, tmp_path / "broken", **options)
    run(data, tmp_path / "whole", **options)
    assert_same(checkpoint_of(tmp_path / "broken"), checkpoint_of(tmp_path / "whole"))


def test_teachers_of_other_data(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biasloss_ext.recipes.loop.build_model", build_small)
    monkeypatch.setattr("biasloss_ext.recipes.trained.build_model", build_small)
    run(write_cifar(tmp_path / "data"), tmp_path / "teacher", epochs=1, loss="ce")
    said = fails("train --loss ce --out out --teacher teacher")
    assert (
        "--teacher must be a run on the same classes, in the same order: teacher has airplane, automobile, bird and"
        in said
    )
    write_folder(tmp_path / "flowers")
    recipe = "--data imagefolder --data-dir flowers --loss ce --batch-size 4 --epochs 1"
    flowers = open_data(make_recipe("imagefolder", data_dir=str(tmp_path / "flowers"), image_size=16), CPU, 0)
    state = checkpoint_of(tmp_path / "teacher")
    state["data"] = flowers.described
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "teacher").mkdir()
    torch.save(
        {**state, "model": build_small(make_recipe("digits"), 2, 3, 16).state_dict()},
        tmp_path / "teacher/checkpoint.pt",
    )
    said = fails(f"train {recipe} --out out --teacher teacher --image-size 32")
    assert (
        "--teacher must be a run on the same images: teacher differs (image_size 16 there, 32 here, resize 18" in said
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--bce --loss focal", "--bce goes with --loss bias or ce"),
        ("--rand-augment 31", "rand augment must be in [0, 30], got 31"),
        ("--rand-augment=-1", "rand augment must be in [0, 30], got -1"),
        ("--random-erasing 1.5", "random erasing must be in [0, 1], got 1.5"),
        ("--rms-decay 1", "rms decay must be in [0, 1), got 1.0"),
        ("--epsilon 0", "epsilon must be above 0, got 0.0"),
        ("--teacher none", "there is no checkpoint none/checkpoint.pt"),
        ("--distill-weight 0", "distill weight must be in (0, 1], got 0.0"),
        ("--distill-temperature 0", "distill temperature must be above 0, got 0.0"),
    ],
)
def test_wrong_options(fails: Fails, options: str, sentence: str) -> None:
    assert sentence in fails(f"train --out out {options}")
