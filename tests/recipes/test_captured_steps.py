"""Steps captured in a graph: the same training as eager steps, on a stand-in for CUDA's capture, and every reason against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext.recipes import loop
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.graphs import WARM_UP_STEPS, CapturedSteps, Result, why_not_captured
from biasloss_ext.recipes.processes import Processes
from tests.recipes.tiny import assert_same, checkpoint_of, run, tiny_recipe, use_linear_model, write_cifar

GPU = Processes(torch.device("cuda"))


class FakeCapture:
    """Replays by running the work again into the tensors of the capture, as a graph does; reads no other tensors."""

    def __init__(self) -> None:
        self.warmed_up = self.captured = self.replayed = 0
        self.parameters: list[nn.Parameter] = []

    def warm_up(self, work: Callable[[], Result]) -> Result:
        self.warmed_up += 1
        return work()

    def capture(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        self.captured += 1
        result = work()
        gradients = [parameter.grad for parameter in self.parameters]
        for values in (*result, *gradients):  # a capture computes nothing
            if values is not None:
                values.fill_(float("nan"))

        def replay() -> None:
            self.replayed += 1
            for parameter in self.parameters:
                parameter.grad = None
            again = work()
            pairs = zip((*result, *gradients), (*again, *(p.grad for p in self.parameters)), strict=True)
            for static, new in pairs:
                if static is not None:
                    static.copy_(new)
            for parameter in self.parameters:
                parameter.grad = None

        return replay, result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("options", [{}, {"loss": "ce", "amp": "fp16"}, {"optimizer": "adamw", "ema_decay": 0.9}])
def test_training_is_that_of_eager_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    use_linear_model(monkeypatch)
    run(data, tmp_path / "eager", **options)
    fake = FakeCapture()
    monkeypatch.setattr(loop, "why_not_captured", lambda *_: None)
    monkeypatch.setattr(loop, "CudaCapture", lambda: fake)
    shared = loop.CapturedSteps

    def captured_steps(compute: Any, parameters: list[nn.Parameter], *others: Any) -> CapturedSteps:
        fake.parameters = parameters
        return shared(compute, parameters, *others)

    monkeypatch.setattr(loop, "CapturedSteps", captured_steps)
    recipe = tiny_recipe(data, **options)
    loop.train(recipe, tmp_path / "graph", device="cpu", cuda_graphs=True, display=Display(shown=False))
    assert (fake.warmed_up, fake.captured, fake.replayed) == (WARM_UP_STEPS, 1, 10 - WARM_UP_STEPS)
    eager, captured = checkpoint_of(tmp_path / "eager"), checkpoint_of(tmp_path / "graph")
    for content in (eager, captured):
        content["recipe"].pop("data_dir")
    assert_same(eager, captured)


class Steps:
    """`CapturedSteps` around a product with one parameter, and what it said."""

    def __init__(self, error: str | None = None) -> None:
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.eager = 0
        self.said: list[str] = []
        self.fake = FakeCapture()
        self.fake.parameters = [self.weight]
        if error is not None:
            self.fake.capture = lambda work: self._broken(work, error)  # type: ignore[method-assign]
        self.call = CapturedSteps(self._compute, [self.weight], self.fake, self.said.append)

    def _broken(self, work: Callable[[], Result], error: str) -> Any:
        work()
        raise RuntimeError(error)

    def _compute(self, images: Tensor, target: Tensor) -> Result:
        self.eager += 1
        loss = (self.weight * images).sum() * target.sum()
        loss.backward()
        return loss.detach(), self.weight.detach() * 1.0

    def step(self, images: Tensor) -> Tensor:
        """The loss and the gradient are those of this batch."""
        self.weight.grad = None
        target = torch.ones(1)
        loss, _ = self.call(images, target)
        assert self.weight.grad is not None
        torch.testing.assert_close(self.weight.grad, images.sum(0) if images.dim() > 1 else images)
        torch.testing.assert_close(loss, (self.weight.detach() * images).sum())
        return loss


def test_results_of_a_replay_are_not_overwritten_by_the_next() -> None:
    steps = Steps()
    losses = [steps.step(torch.tensor([1.0, float(number)])) for number in range(6)]
    assert [loss.item() for loss in losses] == [2.0 + 3.0 * number for number in range(6)]
    assert steps.fake.replayed == 6 - WARM_UP_STEPS
    assert steps.said == []


def test_a_batch_of_another_shape_runs_eagerly_between_replays() -> None:
    steps = Steps()
    for _ in range(WARM_UP_STEPS + 1):
        steps.step(torch.tensor([1.0, 2.0]))
    replayed = steps.fake.replayed
    steps.step(torch.tensor([[1.0, 2.0], [5.0, 7.0]]))
    steps.step(torch.tensor([1.0, 2.0]).double().float()[None])
    assert steps.fake.replayed == replayed
    steps.step(torch.tensor([4.0, 5.0]))
    assert (steps.fake.replayed, steps.fake.captured) == (replayed + 1, 1)


def test_a_step_that_cannot_be_captured_runs_eagerly_with_one_sentence() -> None:
    steps = Steps(error="operation not permitted when stream is capturing\nmore lines")
    for number in range(6):
        steps.step(torch.tensor([1.0, float(number)]))
    assert steps.said == [
        "--cuda-graphs: the step cannot be captured, and runs eagerly: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize(
    ("options", "here", "reason"),
    [
        ({}, Processes(torch.device("cpu")), "they need a GPU, and this run is on cpu"),
        ({}, Processes(torch.device("cuda"), 2), "processes exchange gradients"),
        ({"accumulate": 2}, GPU, "use --accumulate 1"),
        ({"compile": True}, GPU, "leave out --compile"),
    ],
)
def test_reasons(data: Path, options: dict[str, Any], here: Processes, reason: str) -> None:
    recipe = tiny_recipe(data)
    assert why_not_captured(recipe, GPU) is None
    found = why_not_captured(dataclasses.replace(recipe, **options), here)
    assert found is not None
    assert reason in found


def test_without_a_gpu_the_command_says_so_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    from biasloss_ext.cli import main

    use_linear_model(monkeypatch)
    given = f"train --data cifar10 --data-dir {data} --epochs 1 --batch-size 16 --device cpu --cuda-graphs"
    monkeypatch.setattr("sys.argv", ["biasloss", *given.split(), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().out
    assert exit_.value.code in (0, None), said
    assert said.count("--cuda-graphs: steps run eagerly: they need a GPU, and this run is on cpu") == 1
    assert (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_on_a_gpu(data: Path, tmp_path: Path) -> None:
    """Fused blocks, mixed precision and Bias Loss: the losses of eager steps, to the rounding of the optimizer's steps."""
    losses = {}
    for captured in (False, True):
        said: list[str] = []
        display = Display(shown=False)
        display.say = said.append  # type: ignore[method-assign, assignment]
        recipe = tiny_recipe(data, amp="bf16", channels_last=True, small_input=True)
        out = tmp_path / str(captured)
        outcome = loop.train(recipe, out, device="cuda", cuda_graphs=captured, display=display)
        losses[captured] = [row["train_loss"] for row in outcome.history]
        assert not [line for line in said if "eagerly" in line]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
