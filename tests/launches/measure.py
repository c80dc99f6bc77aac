"""Counts the launches of training steps on the GPU path and times the host, on the stub of a GPU; prints JSON.

Operations of PyTorch count one launch each: the innermost ones that a profiler sees, views and allocations aside.
"""

from __future__ import annotations

import collections
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext import FusedBiasLoss
from biasloss_ext.models import skipblocknet_m
from biasloss_ext.nn import FusedInvertedResidual, InvertedResidual
from tests.launches import stub

BLOCKS = 8  # of a chain whose host time is measured
# Innermost operations that launch nothing.
FREE = {
    "_has_compatible_shallow_copy_type", "_nnpack_available", "_reshape_alias", "_unsafe_view", "alias",
    "as_strided", "as_strided_", "contiguous", "detach", "detach_", "empty", "empty_like", "empty_permuted",
    "empty_strided", "expand", "flatten", "is_pinned", "is_same_size", "lift_fresh", "narrow", "new_empty",
    "new_empty_strided", "numpy_T", "permute", "reshape", "reshape_as", "resize_", "resolve_conj", "resolve_neg",
    "result_type", "select", "set_", "slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze",
    "view", "view_as",
}  # fmt: skip
# Operations that are made of others on a CPU, and the kernels that they launch on a GPU. The only convolution is the stem's,
# whose input needs no gradient.
WHOLE = {
    "_foreach_copy_": 1,
    "addmm": 1,
    "convolution_backward": 1,
    "sum": 1,
    "avg_pool2d_backward": 1,
    "convolution": 1,
    "dropout": 0,
}


def _count(event: Any, found: collections.Counter[str]) -> bool:
    """Adds what an operation launches to ``found``; whether it launches anything."""
    name = event.name.removeprefix("aten::")
    if name in WHOLE:
        found[f"torch {name}"] += WHOLE[name]
        return True
    inner = [_count(child, found) for child in event.cpu_children]
    if not any(inner) and event.name.startswith("aten::") and name not in FREE:
        found[f"torch {name}"] += 1
        return True
    return any(inner)


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """Launches by kind and name."""
    stub.launches.clear()
    with torch.autograd.profiler.profile(use_device=None) as profile:
        work()
    found: collections.Counter[str] = collections.Counter()
    for event in profile.function_events:
        if event.cpu_parent is None:
            _count(event, found)
    found.update({f"ours {name}": number for name, number in stub.launches.items()})
    return dict(found)


def block(kind: type[InvertedResidual], squeeze_excite: bool, channels: int = 16, expansion: int = 4) -> nn.Module:
    made = kind(channels, channels * expansion, channels, 3, squeeze_excite=squeeze_excite)
    return made.to(memory_format=torch.channels_last).train()


def images(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()


def block_step(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    module.zero_grad()
    x.grad = None
    module(x).backward(grad)


def count_block(squeeze_excite: bool, channels: int) -> dict[str, int]:
    module, x = block(FusedInvertedResidual, squeeze_excite, channels, 6), images(2, channels, 14, 14)
    grad = torch.randn_like(x)
    block_step(module, x, grad)
    return counted(lambda: block_step(module, x, grad))


def count_network(autocast: bool) -> dict[str, int]:
    model = skipblocknet_m(1000, drop_rate=0.0, return_features="variance", fused=True)
    model = model.to(memory_format=torch.channels_last).train()
    loss_fn, x, target = FusedBiasLoss(), images(2, 3, 64, 64).detach(), torch.randint(1000, (2,))

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            variance, scores = model(x)
            loss = loss_fn(None, scores, target, variance=variance)
        loss.backward()

    step()
    return counted(step)


def host_ratios(rounds: int, repetitions: int) -> dict[str, list[float]]:
    """Host time of a fused block over that of the plain one, on maps of 2 x 2 positions; medians of rounds in turns."""
    found: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(rounds):
        times = host_times(repetitions)
        for part, ratios in found.items():
            ratios.append(statistics.median(times[f"fused {part}"]) / statistics.median(times[f"plain {part}"]))
    return found


def host_times(repetitions: int) -> dict[str, list[float]]:
    """Microseconds of the host per block, of chains of fused and of plain blocks in turns, on maps of 2 x 2 positions. The
    garbage collector is off, as in `timeit`: what it costs depends on all objects of the process."""
    torch.set_num_threads(1)
    kinds = {"fused": FusedInvertedResidual, "plain": InvertedResidual}
    modules = {name: nn.Sequential(*(block(kind, True) for _ in range(BLOCKS))) for name, kind in kinds.items()}
    x = images(2, 16, 2, 2)
    grad = torch.randn_like(x)
    found: dict[str, list[float]] = {f"{name} {part}": [] for name in modules for part in ("forward", "backward")}
    gc.collect()
    gc.disable()
    for round_ in range(repetitions + 5):
        for name, module in modules.items():
            module.zero_grad()
            start = time.perf_counter()
            out = module(x)
            middle = time.perf_counter()
            out.backward(grad)
            end = time.perf_counter()
            if round_ >= 5:
                found[f"{name} forward"].append((middle - start) * 1e6 / BLOCKS)
                found[f"{name} backward"].append((end - middle) * 1e6 / BLOCKS)
    gc.enable()
    return found


def main() -> None:
    stub.install()
    results: dict[str, Any] = {
        f"{width} block {name}": count_block(squeeze_excite, channels)
        for width, channels in (("narrow", 16), ("wide", 112))
        for name, squeeze_excite in (("with attention", True), ("without attention", False))
    }
    results["SkipblockNet-M, float32"] = count_network(False)
    results["SkipblockNet-M, bfloat16 autocast"] = count_network(True)
    if "--host" in sys.argv:
        results["host"] = host_ratios(5, 20)
        results["host times"] = {name: statistics.median(times) for name, times in host_times(50).items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
