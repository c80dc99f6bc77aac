"""The Triton kernels of the blocks, compiled ahead of time for launches of SkipblockNet-M's training: no spills.

`block_limits.csv` is read as `limits.csv` is. Channels that are no multiple of 16, as most are here, must not cost the kernels
their 16-byte loads; copies to shared memory of 16 bytes count as such.
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
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from triton_resources.ahead_of_time import Recorder, compile_launch, resources_of

from biasloss_ext.ops import maps, triton_maps
from biasloss_ext.ops.batch_norm import triton as batch_norm
from biasloss_ext.ops.pointwise import triton as pointwise
from biasloss_ext.ops.pool_variance import triton as pool
from biasloss_ext.ops.squeeze_excite import triton as squeeze_excite

CAPABILITIES = (80, 90, 100)
BF16, F32 = torch.bfloat16, torch.float32
SAMPLES = 8  # specialisation does not depend on it
LARGEST_FRAME = 8  # bytes: one pair of registers, once a tile
LIMITS = Path(__file__).parent / "block_limits.csv"
KERNEL_MODULES = (
    (triton_maps, "kernels"),
    (batch_norm, "kernels"),
    (pointwise, "kernels"),
    (pointwise, "backward_kernels"),
    (pool, "kernels"),
    (squeeze_excite, "kernels"),
)


def feature_map(channels: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(SAMPLES, channels, size, size, dtype=dtype, memory_format=torch.channels_last)


def gate_of(channels: int, gated: bool) -> Tensor | None:
    return torch.empty(SAMPLES, channels) if gated else None


def forward(dtype: torch.dtype, inputs: int, outputs: int, size: int, activation: int, gated: bool = False) -> Any:
    x, weight, affine = feature_map(inputs, size, dtype), torch.empty(outputs, inputs, 1, 1), torch.empty(2, inputs)
    pointwise.pointwise(x, weight, affine, activation, gate_of(inputs, gated), None, maps.IDENTITY, None, True)


def backward(dtype: torch.dtype, inputs: int, outputs: int, size: int, activation: int, gated: bool = False) -> Any:
    x, y = feature_map(inputs, size, dtype), feature_map(outputs, size, dtype)
    weight, affine = torch.empty(outputs, inputs, 1, 1), torch.empty(2, inputs)
    coefficients, gate = torch.empty(4, outputs), gate_of(inputs, gated)
    pointwise.pointwise_backward(y, y, coefficients, x, weight, affine, affine[0], activation, gate, None, True, True)


def inference(dtype: torch.dtype, inputs: int, outputs: int, size: int) -> None:
    """Normalisation folded away; bias, activation and residual in the epilogue."""
    x, y = feature_map(inputs, size, dtype), feature_map(outputs, size, dtype)
    weight, bias = torch.empty(outputs, inputs, 1, 1), torch.empty(outputs)
    pointwise.pointwise(x, weight, None, maps.IDENTITY, None, bias, maps.HARDSWISH, y, False)


def normalisation(dtype: torch.dtype, channels: int, size: int) -> None:
    y, affine, coefficients = feature_map(channels, size, dtype), torch.empty(2, channels), torch.empty(4, channels)
    batch_norm.batch_norm_moments(y)
    batch_norm.batch_norm_apply(y, affine, maps.HARDSWISH, y)
    batch_norm.batch_norm_sums(y, y, affine, affine[0], maps.HARDSWISH)
    batch_norm.batch_norm_backward(y, y, affine, coefficients, maps.HARDSWISH)


def pooling(dtype: torch.dtype, channels: int, size: int) -> None:
    x, affine, pooled = feature_map(channels, size, dtype), torch.empty(2, channels), torch.empty(SAMPLES, channels)
    pool.pool_variance(x, affine, maps.HARDSWISH, True)
    pool.pool_variance_backward(pooled, x, affine, affine[0], maps.HARDSWISH)


def gate(channels: int, reduced: int) -> None:
    pooled, hidden = torch.empty(SAMPLES, channels), torch.empty(SAMPLES, reduced)
    weight = torch.empty(reduced, channels)
    squeeze_excite.squeeze_excite(
        pooled, weight, weight[:, 0], weight.view(channels, reduced), weight[0], maps.RELU, maps.HARDSIGMOID
    )
    squeeze_excite.squeeze_excite_backward(
        pooled, pooled, hidden, pooled, weight, weight.view(channels, reduced), maps.RELU, maps.HARDSIGMOID
    )


LAUNCHES: dict[str, Callable[[], Any]] = {
    **{
        f"{step.__name__} {inputs} to {outputs} at {size} {str(dtype)[6:]}": (
            lambda step=step, dtype=dtype, inputs=inputs, outputs=outputs, size=size, gated=gated: step(
                dtype, inputs, outputs, size, maps.HARDSWISH if gated or inputs > outputs else maps.IDENTITY, gated
            )
        )
        for step in (forward, backward)
        for dtype in (BF16, F32)
        for inputs, outputs, size, gated in (
            (16, 64, 112, False),
            (64, 24, 56, False),
            (24, 72, 56, False),
            (240, 40, 28, True),
            (112, 672, 14, False),
            (960, 160, 7, True),
        )
    },
    "inference 72 to 24 at 56 bfloat16": lambda: inference(BF16, 72, 24, 56),
    "batch norm 72 at 56 bfloat16": lambda: normalisation(BF16, 72, 56),
    "batch norm 72 at 56 float32": lambda: normalisation(F32, 72, 56),
    "pool 960 at 7 bfloat16": lambda: pooling(BF16, 960, 7),
    "pool 120 at 28 float32": lambda: pooling(F32, 120, 28),
    "gate 672 by 168": lambda: gate(672, 168),
}


def recorded(launch: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    recorders: dict[str, Recorder] = {}
    for module, attribute in KERNEL_MODULES:
        kernels = getattr(module, attribute)
        names = [name for name in vars(kernels) if name.endswith("_kernel")]
        family = module.__name__.split(".")[-2]
        own = {name: Recorder(getattr(kernels, name)) for name in names}
        recorders.update({f"{family}.{name}": recorder for name, recorder in own.items()})
        monkeypatch.setattr(module, attribute, SimpleNamespace(**own))
    launch()
    return {name: [(r.kernel, own) for own in r.launches] for name, r in recorders.items() if r.launches}


def distinct(launches: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, dict[str, Any]]]:
    """One of each set of constants."""
    seen = {}
    for kernel, launch in launches:
        constants = tuple((p.name, str(launch[p.name])) for p in kernel.params if p.is_constexpr)
        seen[constants, tuple(launch[p.name] is None for p in kernel.params)] = (kernel, launch)
    return list(seen.values())


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
    for kernel, own in launches.items():
        registers, loads = table[kernel]
        for function, launch in distinct(own):
            for capability in CAPABILITIES:
                used = resources_of(compile_launch(function, launch, capability), tmp_path)
                if (
                    used.stack > LARGEST_FRAME
                    or used.local
                    or used.registers > registers
                    or used.loads_of_16_bytes < loads
                ):
                    problems.append(f"{kernel} on sm_{capability}: {used}, limits {registers} registers, {loads} loads")
    assert not problems, "\n".join(problems)


def test_table_has_no_other_launches() -> None:
    assert {launch for launch, _ in limits()} == LAUNCHES.keys()
