"""Bytes that a training step of SkipblockNet-M moves on the GPU path: ``python -m bench.traffic``.

Three counts per kernel of the step, for maps of 16-bit elements, scaled to a batch of 256:

- *tensors*: every tensor that a launch is given, once: the traffic of a kernel that reads and writes each element once.
- *loads* and *stores*: the elements that the kernel's own instructions ask for, counted by Triton's interpreter in a sample of
  the programs of each launch. What exceeds the tensors is read again, by other programs, and comes from a cache where that
  holds it. What the last program adds up at the end is not in the sample.

Depthwise convolutions are C++ and run as plain PyTorch here: of them the tensors alone are counted; what they read again, the
halo of their tiles, is in NOTES.md. The stem and the loss are not counted.
"""

from __future__ import annotations

import argparse
import collections
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

import numpy as np
import torch
from torch import Tensor

from biasloss_ext.ops import backends, registry, triton_launch

BATCH = 256  # of the floors in NOTES.md
SAMPLED = 8  # programs of each launch


@dataclass
class Bytes:
    launches: int = 0
    tensors: int = 0
    loads: int = 0
    stores: int = 0


def _bytes(values: Iterable[Any]) -> int:
    """Of all distinct tensors with elements; counters aside."""
    tensors = {t.data_ptr(): t for t in values if isinstance(t, Tensor) and t.dtype != torch.int32 and t.numel() > 0}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class Counter:
    """Counts what the launches of a step touch, by kernel."""

    def __init__(self) -> None:
        self.kernels: dict[str, Bytes] = collections.defaultdict(Bytes)
        self.current = Bytes()

    def install(self) -> None:
        self._count_elements()
        self._sample_programs()
        self._count_launches()
        for name in ("depthwise", "depthwise_backward"):
            self._count_calls(registry.OPS[name])

    def _count_elements(self) -> None:
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

    def _sample_programs(self) -> None:
        """Of each launch, a few programs at even distances stand for all."""
        from triton.runtime import interpreter

        builder, counter, run = interpreter.interpreter_builder, self, interpreter.GridExecutor.__call__
        set_dimensions, set_index = builder.set_grid_dim, builder.set_grid_idx

        def sampled(executor: Any, *arguments: Any, **options: Any) -> None:
            (programs,) = executor.grid
            chosen = sorted({round(i * (programs - 1) / (SAMPLED - 1)) for i in range(SAMPLED)})
            executor.grid = (len(chosen),)
            builder.set_grid_dim = lambda *_: set_dimensions(programs, 1, 1)
            builder.set_grid_idx = lambda x, *_: set_index(chosen[x], 0, 0)
            total, counter.current = counter.current, Bytes()
            run(executor, *arguments, **options)
            total.loads += counter.current.loads * programs // len(chosen)
            total.stores += counter.current.stores * programs // len(chosen)

        interpreter.GridExecutor.__call__ = sampled

    def _count_launches(self) -> None:
        counter, call = self, triton_launch.Launch.__call__

        def counting(self: Any, *tensors: Tensor | None) -> None:
            module = self.kernel.fn.__module__.split(".")[-2]
            counter.current = counter.kernels[f"{module} {self.kernel.fn.__name__}"]
            counter.current.launches += 1
            counter.current.tensors += _bytes(tensors)
            call(self, *tensors)

        triton_launch.Launch.__call__ = counting  # type: ignore[method-assign]

    def _count_calls(self, op: registry.Op) -> None:
        counter, reference = self, op.reference

        def counting(*arguments: Any, **options: Any) -> Any:
            results = reference(*arguments, **options)
            found = counter.kernels[op.name]
            found.launches += 1
            found.tensors += _bytes((*arguments, *options.values(), *results))
            return results

        op.reference = counting


def _element_size(pointers: Any) -> int:
    bits: int = pointers.dtype.element_ty.primitive_bitwidth
    return bits // 8


def count_step(batch: int, size: int) -> dict[str, Bytes]:
    """One training step on the kernels that a GPU would take; depthwise convolutions run as plain PyTorch."""
    from biasloss_ext.models import skipblocknet_m
    from biasloss_ext.nn import fused_chain

    fused_chain._why_no_kernels = lambda device: None  # type: ignore[assignment]
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


def table(kernels: dict[str, Bytes], scale: float) -> str:
    lines = [
        "| kernel | launches | tensors, GB | loads, GB | stores, GB | loads and stores over tensors |",
        "|---|---|---|---|---|---|",
    ]
    rows = sorted(kernels.items(), key=lambda item: -item[1].tensors)
    counted = [found for _, found in rows if found.loads > 0]
    rows += [("all", _sum(kernels.values())), ("all whose loads are counted", _sum(counted))]
    return "\n".join([*lines, *(_row(name, found, scale) for name, found in rows)])


def _sum(parts: Iterable[Bytes]) -> Bytes:
    columns = zip(*((part.launches, part.tensors, part.loads, part.stores) for part in parts), strict=True)
    return Bytes(*map(sum, columns))


def _row(name: str, found: Bytes, scale: float) -> str:
    tensors, loads, stores = (count * scale / 1e9 for count in (found.tensors, found.loads, found.stores))
    if found.loads == 0 or name == "all":
        return f"| {name} | {found.launches} | {tensors:.2f} | | | |"
    ratio = (found.loads + found.stores) / found.tensors
    return f"| {name} | {found.launches} | {tensors:.2f} | {loads:.2f} | {stores:.2f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    arguments = parser.parse_args()
    print(table(count_step(arguments.batch, arguments.size), BATCH / arguments.batch))


if __name__ == "__main__":
    main()
