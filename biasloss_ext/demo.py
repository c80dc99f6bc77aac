"""``make demo``: a small CNN on handwritten digits, with Bias Loss and with cross-entropy, and what the loss costs.

The data are scikit-learn's 1797 digits, split as in ``biasloss train``. Everything is written into one folder:
``report.md`` with its tables, and the plots that it shows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.functional import feature_variance
from biasloss_ext.loss import FusedBiasLoss

LOSSES = ("bias", "cross-entropy")
SEEDS = (0, 1, 2)
TIMED_SHAPES = ((128, 960, 7, 1000), (128, 512, 4, 100))  # samples, channels, height and width, classes
QUANTILES = (0.05, 0.5, 0.95)


@dataclass
class Run:
    """Test accuracy after every epoch, and the quantiles of the weights that the loss gave in it."""

    accuracy: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)


@dataclass
class Digits:
    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


class SmallNet(nn.Module):
    """Returns the last feature maps, (N, 64, 4, 4), and the scores, (N, 10), of images (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.Hardswish(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.Hardswish(),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.classifier(features.mean((2, 3)))


def load_digits() -> Digits:
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    classes = torch.from_numpy(digits.target).long()
    train, test = model_selection.train_test_split(
        range(len(classes)), test_size=360, stratify=digits.target, random_state=0
    )
    return Digits(images[train], classes[train], images[test], classes[test])


def train(digits: Digits, loss: str, seed: int, epochs: int, after_epoch: Callable[[float], None]) -> Run:
    torch.manual_seed(seed)
    model = SmallNet()
    loss_fn = FusedBiasLoss()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    run = Run()
    for _ in range(epochs):
        model.train()
        given: list[Tensor] = []
        for batch in torch.randperm(len(digits.train_classes)).split(64):
            features, output = model(digits.train_images[batch])
            target = digits.train_classes[batch]
            if loss == "bias":
                value, weights = loss_fn(features, output, target, return_weights=True)
                given.append(weights)
            else:
                value = F.cross_entropy(output, target)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        schedule.step()
        run.accuracy.append(accuracy(model, digits))
        if given:
            run.weights.append(torch.cat(given).quantile(torch.tensor(QUANTILES)).tolist())
        after_epoch(run.accuracy[-1])
    return run


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    predicted = model(digits.test_images)[1].argmax(1)
    return float((predicted == digits.test_classes).double().mean())


def time_losses(repeats: int) -> list[tuple[str, dict[str, float]]]:
    """Median milliseconds, forward and backward, of contenders that take turns."""
    rows = []
    for samples, channels, size, classes in TIMED_SHAPES:
        for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            features = torch.randn(samples, channels, size, size).contiguous(memory_format=layout)
            output = torch.randn(samples, classes, requires_grad=True)
            target = torch.randint(classes, (samples,))
            steps = contenders(features, output, target)
            seconds: dict[str, list[float]] = {contender: [] for contender in steps}
            for turn in range(repeats + 3):
                for contender, step in steps.items():
                    start = time.perf_counter()
                    step()
                    if turn >= 3:
                        seconds[contender].append(time.perf_counter() - start)
            medians = {contender: 1e3 * statistics.median(values) for contender, values in seconds.items()}
            rows.append((f"{samples} x {channels} x {size} x {size}, {classes} classes, {name}", medians))
    return rows


def contenders(features: Tensor, output: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    loss_fn = FusedBiasLoss()
    smallest = float("inf")

    def op_by_op() -> Tensor:
        """The formulation of the published code: a variance over flattened maps, a minimum kept as a number."""
        nonlocal smallest
        variance = features.reshape(features.shape[0], -1).var(1)
        low, high = variance.min(), variance.max()
        smallest = min(smallest, low.item())
        weights = torch.exp(0.3 * (variance - smallest) / (high - low)) - 0.3
        return (weights * F.cross_entropy(output, target, reduction="none")).mean()

    variance = feature_variance(features)
    return {
        "FusedBiasLoss": lambda: loss_fn(features, output, target).backward(),
        "variance given": lambda: loss_fn(None, output, target, variance=variance).backward(),
        "published formulation": lambda: op_by_op().backward(),
        "cross-entropy alone": lambda: F.cross_entropy(output, target).backward(),
        "one read + cross-entropy": lambda: (features.sum(), F.cross_entropy(output, target).backward()),
    }


def plot_accuracy(runs: dict[str, list[Run]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (loss, of_loss) in zip(("tab:orange", "tab:blue"), runs.items(), strict=True):
        for index, run in enumerate(of_loss):
            axes.plot([100 * a for a in run.accuracy], color=colour, alpha=0.7, label=loss if index == 0 else None)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="Digits, a line per seed", ylim=(80, 100))
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_weights(run: Run, path: Path) -> None:
    from matplotlib.figure import Figure

    low, middle, high = zip(*run.weights, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(range(len(low)), low, high, alpha=0.3, label="5 % to 95 % of the samples")
    axes.plot(middle, label="median")
    axes.set(xlabel="epoch", ylabel="weight w", title="Bias weights over training, first seed")
    axes.legend()
    figure.savefig(path, dpi=120)


def report(runs: dict[str, list[Run]], timings: list[tuple[str, dict[str, float]]]) -> str:
    lines = [
        "# Bias Loss on handwritten digits",
        "",
        "| loss | test accuracy of each seed | mean | spread |",
        "|---|---|---|---|",
    ]
    final = {loss: [100 * run.accuracy[-1] for run in of_loss] for loss, of_loss in runs.items()}
    for loss, values in final.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {loss} | {each} | {statistics.mean(values):.2f} % | {statistics.stdev(values):.2f} |")
    lines += [
        "",
        verdict(*(final[loss] for loss in LOSSES)),
        "",
        "![accuracy](accuracy.png)",
        "![weights](weights.png)",
    ]
    names = list(timings[0][1])
    lines += [
        "",
        "# What the loss costs",
        "",
        "Forward and backward, float32, median milliseconds; in brackets how many",
    ]
    lines += [f"times the time of {names[0]}. {torch.get_num_threads()} CPU threads.", ""]
    lines += ["| features | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for shape, medians in timings:
        ours = medians[names[0]]
        cells = [f"{value:.3f} ({value / ours:.2f})" for value in medians.values()]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def verdict(bias: list[float], plain: list[float]) -> str:
    """Whether the paired differences are larger than their own spread: twice the standard error, over the seeds."""
    differences = [a - b for a, b in zip(bias, plain, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    figures = f"Bias Loss minus cross-entropy, paired by seed: {mean:+.2f} points, standard error {error:.2f}."
    if abs(mean) <= 2 * error or mean == 0:
        return f"{figures} No difference is shown."
    return f"{figures} The difference is larger than the seeds' spread; three seeds of an easy task prove little."


def main() -> None:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m biasloss_ext.demo", description="Bias Loss on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=60, help="timed repetitions of each contender")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    runs: dict[str, list[Run]] = {loss: [] for loss in LOSSES}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for seed in SEEDS:
            for loss in LOSSES:
                bar = progress.add_task(f"{loss}, seed {seed}", total=arguments.epochs)

                def advance(value: float, bar=bar, name=f"{loss}, seed {seed}") -> None:  # type: ignore[no-untyped-def]
                    progress.update(bar, advance=1, description=f"{name}: {100 * value:.2f} %")

                runs[loss].append(train(digits, loss, seed, arguments.epochs, advance))
    console.print("timing the loss ...")
    timings = time_losses(arguments.repeats)
    plot_accuracy(runs, arguments.out / "accuracy.png")
    plot_weights(runs["bias"][0], arguments.out / "weights.png")
    text = report(runs, timings)
    (arguments.out / "report.md").write_text(text)
    console.print(Markdown(text))
    console.print(f"written: {arguments.out / 'report.md'}")


if __name__ == "__main__":
    main()
