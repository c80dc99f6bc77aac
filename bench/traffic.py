"""Bytes that a training step of SkipblockNet-M moves on the GPU path: ``python -m bench.traffic``.

Three counts per kernel of the step, for maps of 16-bit elements:

- *tensors*: every tensor that a launch is given, once: the traffic of a kernel that reads and writes each element once.
- *loads* and *stores*: the elements that the kernel's own instructions ask for, counted by Triton's interpreter. What exceeds
  the tensors is read again, by other programs, and comes from a cache where that holds it.

The interpreter takes a minute for a small batch of small images. Depthwise convolutions are C++ and run as plain PyTorch here;
what they read again, the halo of their tiles, is in NOTES.md.
"""

from __future__ import annotations

import argparse
import collections
import os
from dataclasses import dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

import numpy as np
import torch
from torch import Tensor

from biasloss_ext.ops import backends, triton_launch


@dataclass
class Bytes:
    launches: int = 0
    tensors: int = 0
    loads: int = 0
    stores: int = 0


class Counter:
    """Counts what the launches of a step touch, by kernel."""

    def __init__(self) -> None:
        self.kernels: dict[str, Bytes] = collections.defaultdict(Bytes)
        self.current = Bytes()

    def install(self) -> None:
        from triton.runtime import interpreter

        builder, counter = interpreter.InterpreterBuilder, self
        load, store = builder.create_masked_load, builder.create_masked_store

        def counting_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
            counter.current.loads += int(np.count_nonzero(mask.data)) * _element_size(pointers)
            return load(self, pointers, mask, *others)

        def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            counter.current.stores += int(np.count_nonzero(mask.data)) * _element_size(pointers)
            return store(self, pointers, value, mask, *others)

        builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
        call = triton_launch.Launch.__call__

        def counting_call(self: Any, *tensors: Tensor | None) -> None:
            module = self.kernel.fn.__module__.split(".")[-2]
            counter.current = counter.kernels[f"{module} {self.kernel.fn.__name__}"]
            counter.current.launches += 1
            distinct = {t.data_ptr(): t for t in tensors if t is not None and t.dtype != torch.int32}
            counter.current.tensors += sum(t.numel() * t.element_size() for t in distinct.values())
            call(self, *tensors)

        triton_launch.Launch.__call__ = counting_call  # type: ignore[method-assign]


def _element_size(pointers: Any) -> int:
    bits: int = pointers.dtype.element_ty.primitive_bitwidth
    return bits // 8


def count_step(batch: int, size: int) -> dict[str, Bytes]:
    """One training step on the kernels that a GPU would take; depthwise convolutions run as plain PyTorch."""
    from biasloss_ext.models import skipblocknet_m
    from biasloss_ext.nn import fused_block

    fused_block._why_no_kernels = lambda device: None  # type: ignore[assignment]
    backends._fastest = lambda op, _: "triton" if "triton" in backends.BACKENDS_OF[op] else "reference"
    torch.manual_seed(0)
    model = skipblocknet_m(1000, drop_rate=0.0, fused=True, return_features="variance")
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    counter = Counter()
    counter.install()
    images = torch.randn(batch, 3, size, size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    _, scores = model(images)
    scores.float().logsumexp(1).sum().backward()
    return dict(counter.kernels)


def table(kernels: dict[str, Bytes]) -> str:
    lines = [
        "| kernel | launches | tensors, MB | loads / stores, MB | loads and stores over tensors |",
        "|---|---|---|---|---|",
    ]
    total = Bytes()
    for name, found in sorted(kernels.items(), key=lambda item: -item[1].tensors):
        lines.append(_row(name, found))
        for field in ("launches", "tensors", "loads", "stores"):
            setattr(total, field, getattr(total, field) + getattr(found, field))
    lines.append(_row("all", total))
    return "\n".join(lines)


def _row(name: str, found: Bytes) -> str:
    ratio = (found.loads + found.stores) / max(found.tensors, 1)
    return (
        f"| {name} | {found.launches} | {found.tensors / 1e6:.2f} | {found.loads / 1e6:.2f} / {found.stores / 1e6:.2f} "
        f"| {ratio:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    arguments = parser.parse_args()
    print(table(count_step(arguments.batch, arguments.size)))


if __name__ == "__main__":
    main()
