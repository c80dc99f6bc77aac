"""The loss's cross-entropy beside torch's: ``python -m bench.cross_entropy_grid [--threads 1 2] [--dtype float32]``.

The variance is given, so that the cross-entropy is all that is left. Both take turns in one process, forward and backward;
a line has the median of the ratios of neighbors, and the quartiles. Times are of the CPU with one thread, and of
the clock otherwise: on a machine that others use, only the first can be trusted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from biasloss_ext import FusedBiasLoss

SHAPES = (
    (2, 2, 512, 512),
    (2, 2, 256, 256),
    (65536, 2),
    (65536, 3),
    (65536, 10),
    (2, 21, 256, 256),
    (16384, 32),
    (16384, 48),
    (16384, 64),
    (8192, 100),
    (2, 150, 64, 64),
    (256, 1000),
    (4, 1000, 14, 14),
    (64, 50257),
    (64, 250000),
)


def steps(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> tuple[Callable[[], None], ...]:
    """One step of ours, and one of torch's."""
    scores = torch.randn(shape, dtype=dtype)
    if channels_last:
        scores = scores.contiguous(memory_format=torch.channels_last)
    scores.requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    variance, loss_fn = torch.rand(shape[0]), FusedBiasLoss()

    def ours() -> None:
        loss = loss_fn(None, scores, target, variance=variance)
        loss.backward()
        scores.grad = None

    def torchs() -> None:
        F.cross_entropy(scores, target).backward()
        scores.grad = None

    return ours, torchs


def ratios(pair: tuple[Callable[[], None], ...], clock: Callable[[], float], seconds: float) -> list[float]:
    for step in pair:
        step()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 7 or time.perf_counter() < end:
        times = [clock()]
        for step in pair:
            step()
            times.append(clock())
        found.append((times[1] - times[0]) / (times[2] - times[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cross_entropy_grid", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    options = parser.parse_args()
    print("| scores | layout | threads | ours over torch's, median | quartiles |\n|---|---|---|---|---|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        for shape in SHAPES:
            for channels_last in (False, True)[: 2 if len(shape) == 4 else 1]:
                found = ratios(steps(shape, channels_last, getattr(torch, options.dtype)), clock, options.seconds)
                low, median, high = statistics.quantiles(found, n=4)
                layout = "channels_last" if channels_last else "contiguous"
                print(f"| {shape} | {layout} | {threads} | {median:.2f} | {low:.2f} to {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
