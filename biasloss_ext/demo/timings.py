"""What the loss costs: forward and backward beside the published formulation and plain cross-entropy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.functional import feature_variance
from biasloss_ext.loss import FusedBiasLoss

TIMED_SHAPES = ((128, 960, 7, 1000), (128, 512, 4, 100))  # samples, channels, height and width, classes
WARMUP = 3

Timing = tuple[str, dict[str, float]]


def time_losses(repeats: int, after_turn: Callable[[], None] = lambda: None) -> list[Timing]:
    """Median milliseconds, forward and backward, of contenders that take turns; one row a shape and layout.

    Args:
        repeats: timed repetitions of each contender.
        after_turn: called after every repetition of all, ``turns(repeats)`` times.
    """
    rows = []
    for samples, channels, size, classes in TIMED_SHAPES:
        for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            features = torch.randn(samples, channels, size, size).contiguous(memory_format=layout)
            output = torch.randn(samples, classes, requires_grad=True)
            target = torch.randint(classes, (samples,))
            steps = contenders(features, output, target)
            seconds: dict[str, list[float]] = {contender: [] for contender in steps}
            for turn in range(repeats + WARMUP):
                for contender, step in steps.items():
                    start = time.perf_counter()
                    step()
                    if turn >= WARMUP:
                        seconds[contender].append(time.perf_counter() - start)
                after_turn()
            medians = {contender: 1e3 * statistics.median(values) for contender, values in seconds.items()}
            rows.append((f"{samples} x {channels} x {size} x {size}, {classes} classes, {name}", medians))
    return rows


def turns(repeats: int) -> int:
    """How often :func:`time_losses` calls ``after_turn``."""
    return (repeats + WARMUP) * 2 * len(TIMED_SHAPES)


def contenders(features: Tensor, output: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name: each a forward and a backward pass."""
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


def timing_lines(timings: list[Timing]) -> list[str]:
    """The table as lines of Markdown."""
    names = list(timings[0][1])
    lines = [
        f"Forward and backward, float32, median milliseconds; in brackets how many times the time of {names[0]}.",
        f"{torch.get_num_threads()} CPU threads.",
        "",
        f"| features | {' | '.join(names)} |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for shape, medians in timings:
        ours = medians[names[0]]
        cells = " | ".join(f"{value:.3f} ({value / ours:.2f})" for value in medians.values())
        lines.append(f"| {shape} | {cells} |")
    return lines
