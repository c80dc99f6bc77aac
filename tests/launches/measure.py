"""Counts the launches of training steps on the GPU path and times the host, on the stub of a GPU; prints JSON.

Operations of PyTorch count one launch each: the innermost ones that a profiler sees, other than views and allocations.
"""

from __future__ import annotations

import collections
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import stub
import torch
from torch import Tensor, nn

from biasloss_ext import FusedBiasLoss
from biasloss_ext.models import skipblocknet_m
from biasloss_ext.nn import FusedInvertedResidual, InvertedResidual

# Innermost operations that launch nothing.
FREE = {
    "alias", "as_strided", "contiguous", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "is_pinned",
    "lift_fresh", "narrow", "new_empty", "new_empty_strided", "numpy_T", "permute", "reshape", "reshape_as", "resize_",
    "resolve_conj", "resolve_neg", "result_type", "select", "set_", "slice", "split", "squeeze", "t", "to", "transpose",
    "unbind", "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view", "is_same_size",
}  # fmt: skip
# A convolution's backward pass launches a kernel for each gradient.
SEVERAL = {"mkldnn_convolution_backward": 2, "convolution_backward": 2, "slow_conv2d_backward": 2}


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """Launches by kind and name."""
    stub.launches.clear()
    with torch.autograd.profiler.profile(use_device=None) as profile:
        work()
    found: collections.Counter[str] = collections.Counter()
    for event in profile.function_events:
        if not event.name.startswith("aten::") or event.cpu_children:
            continue
        name = event.name.removeprefix("aten::")
        if name not in FREE:
            found[f"torch {name}"] += SEVERAL.get(name, 1)
    found.update({f"ours {name}": number for name, number in stub.launches.items()})
    return dict(found)


def block(kind: type[InvertedResidual], squeeze_excite: bool, expansion: int = 4) -> nn.Module:
    made = kind(16, 16 * expansion, 16, 3, squeeze_excite=squeeze_excite)
    return made.to(memory_format=torch.channels_last).train()


def images(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()


def block_step(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    module.zero_grad()
    x.grad = None
    module(x).backward(grad)


def count_block(squeeze_excite: bool, expansion: int = 4) -> dict[str, int]:
    module, x = block(FusedInvertedResidual, squeeze_excite, expansion), images(2, 16, 14, 14)
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


def host_times(repetitions: int) -> dict[str, list[float]]:
    """Microseconds of the host, fused and plain block in turns, on maps of 2 x 2 positions."""
    torch.set_num_threads(1)
    modules = {"fused": block(FusedInvertedResidual, True), "plain": block(InvertedResidual, True)}
    x = images(2, 16, 2, 2)
    grad = torch.randn_like(x)
    found: dict[str, list[float]] = {f"{name} {part}": [] for name in modules for part in ("forward", "backward")}
    for round_ in range(repetitions + 5):
        for name, module in modules.items():
            module.zero_grad()
            start = time.perf_counter()
            out = module(x)
            middle = time.perf_counter()
            out.backward(grad)
            end = time.perf_counter()
            if round_ >= 5:
                found[f"{name} forward"].append((middle - start) * 1e6)
                found[f"{name} backward"].append((end - middle) * 1e6)
    return found


def main() -> None:
    stub.install()
    results: dict[str, Any] = {
        "block with squeeze-and-excitation": count_block(True),
        "block without": count_block(False),
        "block without expansion": count_block(False, 1),
        "SkipblockNet-M": count_network(False),
        "SkipblockNet-M under autocast": count_network(True),
    }
    if "--host" in sys.argv:
        results["host"] = {name: statistics.median(times) for name, times in host_times(300).items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
