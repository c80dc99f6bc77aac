"""The training loop beside one written by hand, its options, and runs broken off and taken up again."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from biasloss_ext import FusedBiasLoss
from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data import load_data
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.order import Order
from biasloss_ext.recipes.recipe import make_recipe
from biasloss_ext.recipes.schedule import rate_factor
from biasloss_ext.recipes.trained import load_trained
from tests.recipes.tiny import (
    Interrupting,
    LinearModel,
    assert_same,
    checkpoint_of,
    run,
    tiny_recipe,
    use_linear_model,
    write_cifar,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("loss", ["ce", "bias"])
def test_computes_what_a_loop_by_hand_computes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    use_linear_model(monkeypatch)
    options: dict[str, Any] = {"loss": loss, "milestones": (1,), "warmup_epochs": 1, "label_smoothing": 0.1}
    outcome = run(data, tmp_path, **options)

    recipe = tiny_recipe(data, **options)
    images = load_data(recipe, torch.device("cpu"))
    torch.manual_seed(recipe.seed)
    model = LinearModel(with_features=True)
    bias_loss = FusedBiasLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4)
    rates = [0.01, 0.02, 0.03, 0.04, 0.05, *[0.005] * 5]
    losses = []
    for epoch in range(2):
        for batch, target in images.train_batches(epoch, Order(80, 16).batches(epoch)):
            features, scores = model(batch)
            value = F.cross_entropy(scores, target, label_smoothing=0.1)
            if loss == "bias":
                value = bias_loss(features, scores, target)
            optimizer.param_groups[0]["lr"] = rates[len(losses)]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    for name, trained in checkpoint_of(tmp_path)["model"].items():
        torch.testing.assert_close(trained, model.state_dict()[name])
    assert outcome.history[0]["train_loss"] == pytest.approx(sum(losses[:5]) / 5)
    scores = torch.cat([model(batch)[1] for batch, _ in images.test_batches([torch.arange(16)])])
    target = torch.arange(16) % 10
    assert outcome.history[1]["test_loss"] == pytest.approx(F.cross_entropy(scores, target).item(), rel=1e-5)
    assert outcome.accuracy == pytest.approx((scores.argmax(1) == target).double().mean().item())


VARIANTS: dict[str, dict[str, Any]] = {
    "bias": {},
    "everything": {
        "loss": "focal",
        "optimizer": "adamw",
        "schedule": "cosine",
        "warmup_epochs": 1,
        "accumulate": 2,
        "ema_decay": 0.9,
        "amp": "bf16",
        "channels_last": True,
        "label_smoothing": 0.1,
    },
    "fp16": {"amp": "fp16", "loss": "ce"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_goes_on_to_the_same_bits(data: Path, tmp_path: Path, variant: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(data, whole, **VARIANTS[variant])
    for steps in (2, 6):  # in the first epoch and, of what is left then, in the second
        with pytest.raises(KeyboardInterrupt):
            run(data, broken, Interrupting(steps), checkpoint_steps=1, **VARIANTS[variant])
    run(data, broken, **VARIANTS[variant])
    assert_same(checkpoint_of(broken), checkpoint_of(whole))
    tables = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (whole, broken)]
    assert [row["epoch"] for row in tables[1]] == ["1", "2"]
    assert [{**row, "seconds": ""} for row in tables[0]] == [{**row, "seconds": ""} for row in tables[1]]


def test_a_finished_run_is_left_alone_and_fresh_begins_anew(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path, epochs=1)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert run(data, tmp_path, epochs=1).history == first.history
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"is of another run \(lr 0.05 there, 0.2 here\)"):
        run(data, tmp_path, epochs=1, lr=0.2)
    moved = write_cifar(tmp_path / "moved")
    assert run(moved, tmp_path, epochs=1).history == first.history


def test_accumulated_parts_make_the_step_of_the_whole_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_linear_model(monkeypatch)
    whole = run(data, tmp_path / "whole", loss="ce")
    parts = run(data, tmp_path / "parts", loss="ce", accumulate=4)
    for name, value in checkpoint_of(whole.folder)["model"].items():
        torch.testing.assert_close(checkpoint_of(parts.folder)["model"][name], value, rtol=1e-4, atol=1e-6)
    assert parts.history[1]["train_loss"] == pytest.approx(whole.history[1]["train_loss"], rel=1e-4)


class _Collecting(Display):
    def __init__(self, folder: Path) -> None:
        super().__init__(shown=False)
        self.folder, self.states = folder, []

    def step(self) -> None:  # a step is shown before its checkpoint is written
        if (self.folder / "checkpoint.pt").exists():
            self.states.append(checkpoint_of(self.folder))


def test_moving_average_of_the_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_linear_model(monkeypatch)
    display = _Collecting(tmp_path)
    outcome = run(data, tmp_path, display, checkpoint_steps=1, epochs=1, loss="ce", ema_decay=0.75)
    states = [*display.states, checkpoint_of(tmp_path)]
    assert len(states) == 5
    expected = states[0]["model"]["hidden.weight"].double()
    for state in states[1:]:
        expected = 0.75 * expected + 0.25 * state["model"]["hidden.weight"].double()
    torch.testing.assert_close(states[-1]["ema"]["hidden.weight"].double(), expected, rtol=1e-5, atol=1e-7)
    assert outcome.accuracy == outcome.history[-1]["ema_test_accuracy"]
    monkeypatch.setattr("biasloss_ext.recipes.trained.build_model", _loaded_linear_model)
    assert torch.equal(load_trained(tmp_path).hidden.weight, states[-1]["ema"]["hidden.weight"])  # type: ignore[union-attr]


def _loaded_linear_model(recipe: Any, *_: Any, **__: Any) -> nn.Module:
    from biasloss_ext.recipes.weights import load_weights

    model = LinearModel(with_features=False)
    load_weights(model, Path(recipe.weights), "linear")
    return model


def test_mixed_precision_is_used_and_trains(data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "none", epochs=1)
    for amp, bound in (("bf16", 0.1), ("fp16", 0.02)):
        mixed = run(data, tmp_path / amp, epochs=1, amp=amp)
        difference = abs(mixed.history[0]["train_loss"] - plain.history[0]["train_loss"])
        assert 0 < difference < bound
    assert checkpoint_of(tmp_path / "fp16")["scaler"]["scale"] > 1
    assert checkpoint_of(tmp_path / "bf16")["scaler"] == {}


def test_memory_format_and_compilation_change_rounding_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_(module: nn.Module) -> None:  # the compiler itself takes a minute
        compiled.append(module)

    monkeypatch.setattr(nn.Module, "compile", compile_)
    plain = run(data, tmp_path / "plain", epochs=1)
    assert not compiled
    other = run(data, tmp_path / "other", epochs=1, channels_last=True, compile=True)
    assert len(compiled) == 1
    assert other.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-2)


def test_report_logs_and_weights_of_the_loss(data: Path, tmp_path: Path) -> None:
    outcome = run(data, tmp_path)
    last = outcome.history[-1]
    low, *_, high = quantiles = [
        last[f"weight_{name}"] for name in ("min", "q05", "q25", "median", "q75", "q95", "max")
    ]
    assert quantiles == sorted(quantiles)
    assert low == pytest.approx(0.7, abs=0.2)  # exp(0) - beta, a little more while the running minimum is lower
    assert 1 < high < 3
    report = (tmp_path / "report.md").read_text()
    assert f"**{outcome.accuracy:.2%}** of 16 images" in report
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/train_loss")] == list(range(10))
    assert events.Scalars("epoch/test_accuracy")[-1].value == pytest.approx(outcome.accuracy)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "metrics.csv",
        "model.safetensors",
        "report.md",
        "tensorboard",
    }


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the training loss of epoch 1 is not finite: try a lower --lr"):
        run(data, tmp_path, lr=1e30)


@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixup_and_cutmix(data: Path, tmp_path: Path, options: dict[str, float]) -> None:
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    whole = run(data, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "broken", Interrupting(3), checkpoint_steps=1, **options)
    run(data, tmp_path / "broken", **options)
    assert_same(checkpoint_of(tmp_path / "broken"), checkpoint_of(whole.folder))
    assert whole.history[0]["train_loss"] != run(data, tmp_path / "plain").history[0]["train_loss"]


def test_defaults_are_the_papers() -> None:
    recipe = make_recipe("cifar100")
    assert (recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size) == (0.1, 0.9, 1e-4, 128)
    factors = [rate_factor(recipe, epoch, 1 / 390) for epoch in (0, 79.99, 80, 121.99, 122, 159)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)
    assert make_recipe("cifar100", epochs=16).milestones == (8, 12)


def test_cosine_and_warm_up() -> None:
    recipe = make_recipe("digits", epochs=10, warmup_epochs=2)
    assert rate_factor(recipe, 0, 0.1) == pytest.approx(0.05)  # the first of twenty warm-up steps
    assert rate_factor(recipe, 5, 0.1) == pytest.approx(0.5)
    assert rate_factor(recipe, 10, 0.1) == pytest.approx(0, abs=1e-12)


def test_a_pipe_is_told_that_steps_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars are for terminals; a log would be silent for the whole of a long epoch."""
    now = 0.0
    monkeypatch.setattr("biasloss_ext.recipes.display.time.monotonic", lambda: now)
    with Display() as display:
        display.begin_run("a run", 100, 40)
        for _ in range(30):
            now += 1.0
            display.step()
        display.end_run()
    said = capsys.readouterr().out.splitlines()
    assert said == ["a run  step 50/100", "a run  step 60/100", "a run  step 70/100"]
