"""Stage 5: every op on the shapes of SkipblockNet-M beside PyTorch's own layers, with its share of the measured ceilings.

The shapes of all ops take turns, those that move most bytes first: where time runs out, each op has its largest.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from bench.gpu import arguments
from biasloss_ext.benchmarks import engine, results, shapes, table
from biasloss_ext.benchmarks.contender import Op, Workload
from biasloss_ext.benchmarks.ops import NETWORKS, OPS

LEFT_OUT = (*NETWORKS, "expand_depthwise")  # a network is a stage of its own; the last has no kernels for GPUs
PLAN = engine.Plan(visits=2, seconds=0.1, most_rounds=10)
TINY = dataclasses.replace(engine.TINY, visits=1)


def without_compilers(op: Op) -> Op:
    """Ours and what computes the same in plain PyTorch; compilers take minutes, and come last."""
    return op._replace(
        contenders=tuple(c for c in op.contenders if c.role in ("ours", "peer") and "compile" not in c.name)
    )


def workloads(tiny: bool) -> list[Workload]:
    """Of a GPU also where the CPU stands for one. Tiny: both passes of each op, and the gradients that come alone."""
    by_op = []
    for name, op in OPS.items():
        if name not in LEFT_OUT:
            found = shapes.workloads(name, "cuda", tiny=tiny)
            found = [workload for workload in found if not workload.axis and not workload.one_set]
            if tiny:
                found = _tiny(found)
            by_op.append(sorted(found, key=lambda workload: -op.cost(workload).bytes))
    return [w for turn in itertools.zip_longest(*by_op) for w in turn if w is not None]


def _tiny(found: list[Workload]) -> list[Workload]:
    kinds = {(w.backward, w.gradient): dataclasses.replace(w, batch=2) for w in found}
    return [w for (backward, gradient), w in kinds.items() if backward or gradient or len(kinds) == 1]


def main() -> None:
    given, _ = arguments.parsed(arguments.parser(__doc__))
    plan = dataclasses.replace(TINY if given.tiny else PLAN, limit=given.limit)
    listed = workloads(given.tiny)
    found = engine.run(
        listed,
        given.device,
        plan,
        tiny=given.tiny,
        operations={name: without_compilers(op) for name, op in OPS.items()},
        save=lambda partial: partial.save(given.out),
    )
    found.save(given.out)
    report(found, len(listed), given.device)


def report(found: results.Results, listed: int, device: torch.device) -> None:
    for clock in ("wall", "gpu") if device.type == "cuda" else ("wall",):
        print(table.summary(found, clock).markdown() + "\n")
    print(table.missing(found).markdown() + "\n")
    wrong = [group.name for group in found.groups for entry in group.entries if is_wrong(entry)]
    print(f"{len(found.groups)} of {listed} workloads" + (f", ours failed in {', '.join(wrong)}" if wrong else ""))
    if wrong:
        raise SystemExit(1)


def is_wrong(entry: results.Entry) -> bool:
    """Ours, and it did not run or computes something else; for want of time it may be left out."""
    return entry.role == "ours" and entry.status != "ok" and "no time" not in entry.reason


if __name__ == "__main__":
    main()
