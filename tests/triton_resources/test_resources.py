"""Every Triton kernel of the loss, compiled ahead of time: no spills, few registers, 16-byte loads of the features.

`limits.csv` holds the limits, one line a launch, for all architectures: the most registers a thread may take, and how many
16-byte loads the PTX must have. A slice of aligned features has one load for its shift and four in its loop.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from triton_resources.ahead_of_time import Recorder, compile_launch, resources_of

from biasloss_ext.ops.bias_loss import triton as bias_loss
from biasloss_ext.ops.bias_loss.reference import MEAN, NONE, SUM
from biasloss_ext.ops.feature_variance import triton as feature_variance

CAPABILITIES = (80, 90, 100)
KERNELS = {
    bias_loss: ("partials_kernel", "finish_kernel", "gradient_kernel"),
    feature_variance: ("slice_moments_kernel", "variance_kernel"),
}
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMITS = Path(__file__).parent / "limits.csv"


def loss(
    features: torch.dtype,
    output: torch.dtype,
    samples: int = 256,
    maps: tuple[int, ...] = (960, 7, 7),
    classes: int = 1000,
    positions: int | None = None,
    probabilities: bool = False,
    smoothing: float = 0.0,
    weighted: bool = False,
    variance: bool = False,
    reduction: int = MEAN,
) -> Callable[[], None]:
    """Forward and backward launches. The tensors are of the meta device's kind: their values are never looked at."""

    def launch() -> None:
        dense = () if positions is None else (positions,)
        scores = torch.empty(samples, classes, *dense, dtype=output)
        target = torch.empty_like(scores) if probabilities else torch.empty(samples, *dense, dtype=torch.int64)
        accumulated = F64 if output == F64 else F32
        class_weight = torch.empty(classes, dtype=accumulated) if weighted else None
        given = torch.empty(samples, dtype=accumulated) if variance else None
        maps_of_batch = None if variance else torch.empty(samples, *maps, dtype=features)
        outputs = bias_loss.bias_loss(
            maps_of_batch,
            given,
            None,
            scores,
            target,
            class_weight,
            torch.empty(()),
            0.3,
            0.3,
            True,
            reduction,
            -100,
            smoothing,
        )
        bias_loss.bias_loss_backward(outputs[0], scores, target, class_weight, *outputs[1:], reduction, -100, smoothing)

    return launch


def moments(dtype: torch.dtype, samples: int, *maps: int) -> Callable[[], None]:
    def launch() -> None:
        feature_variance.feature_variance(torch.empty(samples, *maps, dtype=dtype))

    return launch


LAUNCHES = {
    "variance bfloat16": moments(BF16, 256, 960, 7, 7),
    "variance float32, many slices": moments(F32, 16, 960, 14, 14),
    "variance float64, one slice": moments(F64, 600, 96, 5, 5),
    "bfloat16": loss(BF16, BF16),
    "float16": loss(F16, F16),
    "float32": loss(F32, F32),
    "float64": loss(F64, F64, samples=16, smoothing=0.1, weighted=True),
    "float32, bfloat16 scores, few classes": loss(F32, BF16, maps=(512, 4, 4), classes=100, smoothing=0.1),
    "float16, unaligned features": loss(F16, F32, maps=(9, 7, 7), classes=10, reduction=SUM),
    "smoothed, weighted": loss(BF16, F32, smoothing=0.1, weighted=True),
    "probabilities": loss(BF16, BF16, probabilities=True, smoothing=0.1, weighted=True),
    "dense": loss(BF16, BF16, samples=8, classes=21, positions=16384),
    "dense probabilities": loss(BF16, F32, samples=8, classes=150, positions=4096, probabilities=True, reduction=NONE),
    "long rows": loss(F32, F32, samples=64, classes=128256),
    "variance given": loss(F32, F32, variance=True, reduction=NONE),
}


def recorded(launch: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, dict[str, Any]]]:
    recorders = {}
    for module, names in KERNELS.items():
        own = {name: Recorder(getattr(module.kernels, name)) for name in names}
        recorders.update(own)
        monkeypatch.setattr(module, "kernels", SimpleNamespace(**own))
    launch()
    assert all(len(recorder.launches) <= 1 for recorder in recorders.values())
    return {name: (r.kernel, r.launches[0]) for name, r in recorders.items() if r.launches}


def limits() -> dict[tuple[str, str], tuple[int, int]]:
    with LIMITS.open(newline="") as file:
        return {
            (line["launch"], line["kernel"]): (int(line["registers"]), int(line["loads of 16 bytes"]))
            for line in csv.DictReader(file)
        }


@pytest.mark.parametrize("name", LAUNCHES)
def test_resources(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = {kernel: limit for (launch, kernel), limit in limits().items() if launch == name}
    launches = recorded(LAUNCHES[name], monkeypatch)
    assert launches.keys() == table.keys()
    problems = []
    for kernel, (function, launch) in launches.items():
        registers, loads = table[kernel]
        for capability in CAPABILITIES:
            used = resources_of(compile_launch(function, launch, capability), tmp_path)
            if used.stack or used.local or used.registers > registers or used.loads_of_16_bytes < loads:
                problems.append(f"{kernel} on sm_{capability}: {used}, limits {registers} registers, {loads} loads")
    assert not problems, "\n".join(problems)


def test_table_has_no_other_launches() -> None:
    assert {launch for launch, _ in limits()} == LAUNCHES.keys()
