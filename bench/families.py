"""Families of networks: how much of each `accelerate` puts on fused kernels, and what it gains; the tables of docs/accelerate.md.

    python -m bench.coverage --out bench/results/coverage.json
    python -m bench.families --out bench/results/families_CPU.json [--models NAME ...]
    python -m bench.families --write

The first two need timm and torchvision, and the second a quiet machine, or --cpu-time on a busy one. Each model is written when
it is measured, and replaces its row in the file. The last command writes the tables from all results.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext import accelerate, optimize_for_inference
from biasloss_ext.accelerate_command import as_data, inference, training
from biasloss_ext.benchmarks.machine import describe, versions
from biasloss_ext.benchmarks.timing import in_turns
from biasloss_ext.recipes.models import ready_made

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "accelerate.md"
MODELS = (
    "timm:mobilenetv4_conv_small",
    "timm:mobilenetv4_conv_medium",
    "torchvision:mnasnet1_0",
    "timm:lcnet_100",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_large_100",
    "torchvision:mobilenet_v2",
    "timm:repvit_m0_9",
    "timm:fastvit_t8",
    "timm:ghostnet_100",
)
# Their plain training step in channels_last crashes: docs/troubleshooting.md.
CONTIGUOUS_ALONE = ("timm:fastvit_t8",)
BATCH, SIZE = 16, 224


Samples = dict[str, list[float]]
Turns = Callable[[dict[str, Callable[[int], object]]], Samples]


def measured(name: str, turns: Turns, decides: bool) -> dict[str, Any]:
    """Milliseconds of a training step and of inference: eager in both layouts, accelerated, and optimized for inference.

    Args:
        name: of the model.
        turns: times calls in turns.
        decides: whether the accelerated models decide by (wall) time.
    """
    plain = ready_made(name, 1000)
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    last = images.contiguous(memory_format=torch.channels_last)
    report = accelerate(copy.deepcopy(plain))
    in_training, in_evaluation = (copy.deepcopy(plain).train(mode) for mode in (True, False))
    for fused in (in_training, in_evaluation):
        fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        accelerate(fused, measure_on=last if decides else None)
    plain_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    eager = {"contiguous": (plain, images)}
    if name not in CONTIGUOUS_ALONE:
        eager["channels_last"] = (plain_last, last)
    forms = {**eager, "accelerated": (in_evaluation, last), "optimized": (optimize_for_inference(plain_last), last)}
    found = {"inference": turns(_calls(inference, False, forms))}
    found["training"] = turns(_calls(training, True, {**eager, "accelerated": (in_training, last)}))
    return {"model": name, **as_data(report), **found}


def _calls(
    form: Callable[[nn.Module, Tensor], Callable[[int], object]],
    mode: bool,
    pairs: dict[str, tuple[nn.Module, Tensor]],
) -> dict[str, Callable[[int], object]]:
    """A call of each model on its images."""
    return {name: form(model.train(mode) if mode else model.eval(), images) for name, (model, images) in pairs.items()}


def ratios(samples: Samples, ours: str) -> tuple[float, float, float]:
    """Median, least and largest ratio of the faster eager layout over ours, round by round."""
    layouts = [layout for layout in ("contiguous", "channels_last") if layout in samples]
    medians = {layout: statistics.median(samples[layout]) for layout in layouts}
    best = samples[min(medians, key=lambda layout: medians[layout])]
    found = [theirs / own for theirs, own in zip(best, samples[ours], strict=True)]
    return statistics.median(found), min(found), max(found)


def gains(results: dict[str, Any]) -> str:
    """The table of measured gains."""
    lines = [
        "| model | depthwise | 1x1 | normalizations | training step | inference, accelerated | `optimize_for_inference` |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["models"]:
        layers = [f"{kind['fused']} of {kind['total']}" for kind in row["layers"].values()]
        pairs = (("training", "accelerated"), ("inference", "accelerated"), ("inference", "optimized"))
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*ratios(row[part], ours)) for part, ours in pairs]
        lines.append(f"| {' | '.join([row['model'], *layers, *cells])} |")
    return "\n".join([*lines, "", f"Measured on {results['machine']}: {BATCH} images of {SIZE} x {SIZE}, float32."])


def families(coverage: list[dict[str, Any]]) -> str:
    """The table of coverage by family."""
    groups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in coverage:
        groups[row["family"]].append(row)
    lines = ["| family of timm | models | all depthwise convolutions | depthwise convolutions |", "|---|---|---|---|"]
    total = [0, 0, 0, 0]
    for family, rows in sorted(groups.items()):
        full = sum(row["depthwise convolution"][0] == row["depthwise convolution"][1] for row in rows)
        fused, of = (sum(row["depthwise convolution"][i] for row in rows) for i in (0, 1))
        lines.append(f"| {family} | {len(rows)} | {full} | {fused} of {of} |")
        total = [a + b for a, b in zip(total, (len(rows), full, fused, of), strict=True)]
    return "\n".join([*lines, f"| **all** | {total[0]} | {total[1]} | {total[2]} of {total[3]} |"])


def page() -> str:
    """The page with the tables of the committed results between their marks."""
    text = PAGE.read_text()
    tables = {
        "gains": "\n\n".join(gains(json.loads(path.read_text())) for path in sorted(RESULTS.glob("families_*.json"))),
        "families": families(json.loads((RESULTS / "coverage.json").read_text())),
    }
    for name, table in tables.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        text = f"{before}{start}{table}\n{end}{after}"
    return text


def _conditions(cpu_time: bool) -> str:
    found = describe(torch.device("cpu"))
    how = "CPU time of one thread, no block decides by time" if cpu_time else f"{found['threads']} threads"
    return f"{found['name']} ({found['vector_instructions']}), {how}, torch {versions()['torch']}"


def keep(row: dict[str, Any], machine: str, path: Path) -> None:
    """Write the row of a model to a file of this machine, in the order of MODELS."""
    rows = {row["model"]: row}
    if path.exists():
        results = json.loads(path.read_text())
        if results["machine"] != machine:
            raise SystemExit(f"{path} holds results of {results['machine']}, this is {machine}: give another --out")
        rows = {old["model"]: old for old in results["models"]} | rows
    order = [*(name for name in MODELS if name in rows), *(name for name in rows if name not in MODELS)]
    path.write_text(json.dumps({"machine": machine, "models": [rows[name] for name in order]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the times; one of this machine is continued")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread, for a busy machine; no block decides by time"
    )
    parser.add_argument("--write", action="store_true", help="write the tables of the page from committed results")
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(page())
        return
    now = time.thread_time if options.cpu_time else time.perf_counter
    turns: Turns = functools.partial(in_turns, device=torch.device("cpu"), rounds=options.rounds, now=now)
    if options.cpu_time:
        torch.set_num_threads(1)
    for name in options.models:
        row = measured(name, turns, decides=not options.cpu_time)
        if options.out is not None:
            keep(row, _conditions(options.cpu_time), options.out)
        pairs = (("training", "accelerated"), ("inference", "accelerated"), ("inference", "optimized"))
        print(
            name,
            *("{}: {:.2f} ({:.2f} to {:.2f})".format(ours, *ratios(row[part], ours)) for part, ours in pairs),
            flush=True,
        )


if __name__ == "__main__":
    main()
