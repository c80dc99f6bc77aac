"""``biasloss accelerate``: how much of a model runs on fused kernels, and how much faster the model becomes."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

from biasloss_ext.acceleration import accelerate as accelerate_model
from biasloss_ext.benchmarks.timing import in_turns
from biasloss_ext.errors import UserError
from biasloss_ext.inference import optimize_for_inference
from biasloss_ext.ops import maps
from biasloss_ext.recipes.models import ready_made
from biasloss_ext.report import KINDS, Report

CLASSES = 1000


class Timing(NamedTuple):
    """Milliseconds per call.

    Attributes:
        median: the median of the rounds.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ms ({self.low:.1f} to {self.high:.1f})"


def accelerate(
    model: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME, or a NAME that one of them knows")],
    image_size: Annotated[int, typer.Option(min=1, help="height and width of the images that are timed")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="images per step")] = 16,
    rounds: Annotated[
        int, typer.Option(min=0, help="rounds in which every form is timed once; 0 skips the timing")
    ] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:1")] = "cpu",
    measure: Annotated[
        bool,
        typer.Option(help="keep blocks on their plain layers where these are faster, in training and in inference"),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the report and the times")] = None,
) -> None:
    """Show how much of a model runs on fused kernels, with the time of a training step and of inference before and after."""
    if device != "cpu" and not torch.cuda.is_available() and (rounds > 0 or measure):
        raise UserError(f"--device {device}: torch finds no GPU here")
    plain = ready_made(model, CLASSES)
    images = torch.randn(batch_size, 3, image_size, image_size)
    if rounds > 0 or measure:
        plain, images = plain.to(device), images.to(device)
    fused = copy.deepcopy(plain).train()
    report = accelerate_model(fused, measure_on=maps.channels_last(images) if measure else None)
    print(f"{model}, {report}")
    data: dict[str, Any] = {"model": model, **as_data(report)}
    in_evaluation = fused
    if measure:
        in_evaluation = copy.deepcopy(plain).eval()
        of_evaluation = accelerate_model(in_evaluation, measure_on=maps.channels_last(images))
        print(f"in inference, {of_evaluation}")
        data["inference"] = as_data(of_evaluation)
    if rounds > 0:
        data["milliseconds"] = _timed(plain, (fused, in_evaluation), images, rounds)
    if out is not None:
        out.write_text(json.dumps(data, indent=1) + "\n")


def as_data(report: Report) -> dict[str, Any]:
    """A report as plain data for JSON."""
    return {
        "layers": {kind: report.count(kind)._asdict() for kind in KINDS},
        "left": [
            {"reason": reason, "layers": [layer.name for layer in layers], "cost": sum(layer.cost for layer in layers)}
            for reason, layers in report.reasons().items()
        ],
    }


def _timed(
    plain: nn.Module, fused: tuple[nn.Module, nn.Module], images: Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """Print and return the times of each form. The ratios compare with the faster layout of the plain model.

    Args:
        plain: the model as it was.
        fused: the accelerated model for training and for evaluation; may be the same module.
        images: contiguous.
        rounds: the number of times that each form is timed.
    """
    plain_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for_training, for_evaluation = [module.to(memory_format=torch.channels_last) for module in fused]  # type: ignore[call-overload]
    print(f"{len(images)} images of {images.shape[2]} x {images.shape[3]}, {torch.get_num_threads()} threads")
    in_evaluation = {
        "plain": inference(plain.eval(), images),
        "plain, channels_last": inference(plain_last.eval(), maps.channels_last(images)),
        "accelerated": inference(for_evaluation.eval(), maps.channels_last(images)),
        "optimize_for_inference": inference(optimize_for_inference(for_evaluation).eval(), maps.channels_last(images)),
    }
    found = {"inference": _compare("inference", in_evaluation, images.device, rounds)}
    in_training = {
        "plain": training(plain.train(), images),
        "plain, channels_last": training(plain_last.train(), maps.channels_last(images)),
        "accelerated": training(for_training.train(), maps.channels_last(images)),
    }
    found["training step"] = _compare("training step", in_training, images.device, rounds)
    return found


def _compare(
    title: str, steps: dict[str, Callable[[int], object]], device: torch.device, rounds: int
) -> dict[str, Any]:
    timings = {name: _timing(values) for name, values in in_turns(steps, device, rounds).items()}
    best = min(timing.median for name, timing in timings.items() if name.startswith("plain"))
    print(f"  {title}")
    for name, timing in timings.items():
        print(f"    {name:<24} {timing}, {best / timing.median:.2f}x")
    return {name: timing._asdict() for name, timing in timings.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), low, high)


def inference(model: nn.Module, images: Tensor) -> Callable[[int], object]:
    """The timed call."""

    def call(_: int) -> object:
        with torch.inference_mode():
            return model(images)

    return call


def training(model: nn.Module, images: Tensor) -> Callable[[int], object]:
    """The timed step: forward and backward."""

    def call(_: int) -> object:
        model.zero_grad()
        model(images).square().mean().backward()
        return None

    return call
