"""Stage 4: SkipblockNet-M's training step at batch 256 in bfloat16, fused and plain, launched eagerly and from a CUDA graph.

A step is forward and backward pass with cross-entropy; the optimizer is left out. ``--peers`` measures `torch.compile` of the
plain network in its place.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu import arguments
from bench.gpu.arguments import Arguments
from bench.gpu.smoke import tiny_network
from biasloss_ext.benchmarks.timing import GraphClock, KernelClock, WallClock, peak_bytes
from biasloss_ext.models import skipblocknet_m

BATCH, CLASSES, SIZE = 256, 1000, 224
ROUNDS = 7
SETS = 2  # of images; each fills the caches many times over
WARM_UP_STEPS = 3


@dataclass
class Contender:
    """A network and how its step is launched."""

    name: str
    fused: bool
    compile_mode: str | None = None

    def network(self, given: Arguments) -> nn.Module:
        torch.manual_seed(0)
        model = tiny_network(10, self.fused) if given.tiny else skipblocknet_m(CLASSES, drop_rate=0.0, fused=self.fused)
        model = model.to(given.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if self.compile_mode is not None:
            if given.tiny:
                model.compile(backend="aot_eager")  # a compiler takes a minute
            else:
                model.compile(mode=self.compile_mode)
        return model


OURS_AND_PLAIN = (Contender("biasloss_ext, fused", True), Contender("eager channels_last", False))
PEERS = (
    Contender("torch.compile", False, "default"),
    Contender("torch.compile reduce-overhead", False, "reduce-overhead"),
)


class Step:
    """Loss and gradients of one batch of several."""

    def __init__(self, contender: Contender, given: Arguments) -> None:
        self.model = contender.network(given)
        self.parameters = list(self.model.parameters())
        batch, size, classes = (2, 16, 10) if given.tiny else (BATCH, SIZE, CLASSES)
        generator = torch.Generator().manual_seed(1)
        self.batches = []
        for _ in range(SETS):
            images = torch.randn(batch, 3, size, size, generator=generator)
            target = torch.randint(classes, (batch,), generator=generator)
            self.batches.append((images.to(given.device, memory_format=torch.channels_last), target.to(given.device)))
        self.device = given.device

    def __call__(self, turn: int) -> list[Tensor]:
        images, target = self.batches[turn % SETS]
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(images), target)
        return [loss.detach(), *torch.autograd.grad(loss, self.parameters)]


def measure(contenders: Sequence[Contender], given: Arguments) -> dict[str, dict[str, Any]]:
    """Milliseconds and bytes, by contender; what could not be measured has its reason there."""
    results: dict[str, dict[str, Any]] = {contender.name: {} for contender in contenders}
    steps: dict[str, Step] = {}
    for contender in contenders:
        found = results[contender.name]

        def prepare(contender: Contender = contender, found: dict[str, Any] = found) -> None:
            step = Step(contender, given)
            found["loss"] = [float(step(turn)[0]) for turn in range(1 if given.tiny else WARM_UP_STEPS)]
            steps[contender.name] = step

        _attempt(found, prepare)
        given.save(results)
    for name, step in steps.items():
        _attempt(results[name], lambda step=step, name=name: results[name].update(_memory(step, given)))  # type: ignore[misc]
    _eager(steps, results, given)
    given.save(results)
    if given.device.type == "cuda":
        for name, step in steps.items():
            if "torch.compile" not in name:  # reduce-overhead has graphs of its own
                _attempt(results[name], lambda step=step, name=name: results[name].update(_graph(step)))  # type: ignore[misc]
            given.save(results)
    return results


def _attempt(found: dict[str, Any], work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # the other contenders shall still be measured
        found.setdefault("problems", []).append(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")


def _memory(step: Step, given: Arguments) -> dict[str, int]:
    return {"peak_bytes": peak_bytes(step, given.device)}


def _eager(steps: dict[str, Step], results: dict[str, dict[str, Any]], given: Arguments) -> None:
    """Wall time in turns, so that what drifts drifts for all."""
    rounds, shortest = (1, 0.0) if given.tiny else (ROUNDS, 0.2)
    clocks = {name: WallClock(step, given.device, shortest) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, clock in clocks.items():
            samples[name].append(clock.sample() * 1e3)
    for name, taken in samples.items():
        results[name]["wall_ms"] = taken
    if given.device.type == "cuda":
        for name, step in steps.items():
            _attempt(results[name], lambda step=step, name=name: results[name].update(_kernels(step)))  # type: ignore[misc]


def _kernels(step: Step) -> dict[str, float]:
    return {"kernels_ms": KernelClock(step).sample() * 1e3}


def _graph(step: Step) -> dict[str, list[float]]:
    clock = GraphClock(step, SETS, shortest=0.2)
    return {"graph_ms": [clock.sample() * 1e3 for _ in range(ROUNDS)]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: medians."""
    lines = [
        "| training step | wall, eager | kernels, eager | CUDA graph | peak memory | problems |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        cells = [f"{statistics.median(found[key]):.2f} ms" if found.get(key) else "" for key in ("wall_ms",)]
        cells.append(f"{found['kernels_ms']:.2f} ms" if "kernels_ms" in found else "")
        cells.append(f"{statistics.median(found['graph_ms']):.2f} ms" if "graph_ms" in found else "")
        cells.append(f"{found['peak_bytes'] / 1e9:.3g} GB" if "peak_bytes" in found else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {'; '.join(found.get('problems', []))} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--peers", action="store_true", help="torch.compile, in place of ours and the plain network")
    given, others = arguments.parsed(parser)
    results = measure(PEERS if others.peers else OURS_AND_PLAIN, given)
    given.save(results)
    print(table(results))
    failed = [name for name, found in results.items() if "wall_ms" not in found or found.get("problems")]
    print(f"{len(results)} contenders" + (f", with problems: {', '.join(failed)}" if failed else ""))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
