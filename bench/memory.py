"""``python -m bench.memory``: the memory of a training step of SkipblockNet-M by batch size, into bench/results/memory.json.

It counts what PyTorch's allocator hands out, so it is the same on every machine, whatever else runs there. `python -m
bench.pages` writes the table.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from biasloss_ext.benchmarks import engine, machine, shapes, skipblocknet
from biasloss_ext.benchmarks.contender import Contender, Workload
from biasloss_ext.benchmarks.table import Table
from biasloss_ext.benchmarks.timing import peak_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
BATCHES = (1, 4, 16)
CONTENDERS = ("biasloss_ext, fused", "fused + Bias Loss", "eager NCHW", "eager channels_last", "eager + authors' loss")
CPU = torch.device("cpu")


def measure(batches: tuple[int, ...] = BATCHES, sample: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Peak bytes of one step beyond weights and inputs, by contender and batch size."""
    training = next(workload for workload in shapes.workloads("skipblocknet", "cpu") if workload.backward)
    if sample is not None:
        training = dataclasses.replace(training, sample=sample)
    chosen = [c for c in skipblocknet.CONTENDERS if c.name in CONTENDERS and c.takes_part(training)]
    found = {
        contender.name: [_bytes(contender, dataclasses.replace(training, batch=batch)) for batch in batches]
        for contender in sorted(chosen, key=lambda contender: CONTENDERS.index(contender.name))
    }
    return {
        "date": machine.now(),
        "versions": {"torch": torch.__version__},
        "image": list(training.sample),
        "batches": list(batches),
        "peak_bytes": found,
    }


def _bytes(contender: Contender, workload: Workload) -> int:
    step, _ = contender.build(workload, CPU)
    inputs = engine.inputs_of(contender, workload, skipblocknet.make_inputs(workload, CPU))
    step(inputs)  # what is allocated once
    return peak_bytes(lambda turn: step(inputs), CPU)


def table(found: dict[str, Any]) -> Table:
    """A row per contender, with its memory as a multiple of the first one's."""
    ours = next(iter(found["peak_bytes"].values()))
    rows = []
    for name, values in found["peak_bytes"].items():
        cells = (f"{value / 1e6:.4g} MB ({value / own:.2f})" for value, own in zip(values, ours, strict=True))
        rows.append((name, *cells))
    return Table("", ("contender", *(f"{batch} images" for batch in found["batches"])), rows)


def section(path: Path = RESULTS) -> list[str]:
    """Lines for the page on performance; none without results."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    size = "x".join(map(str, found["image"]))
    return [
        "## Memory of a training step",
        "",
        f"SkipblockNet-M, images of {size}, float32, forward and backward: the most that PyTorch's allocator has handed out at",
        "a time, beyond weights and images, and in brackets how many times the first row. `python -m bench.memory` measures it",
        f"(torch {found['versions']['torch']}, {found['date'][:10]}).",
        "",
        table(found).markdown(),
    ]


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
