"""The cost of the loss: forward and backward, compared with the published formulation and plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from biasloss_ext.benchmarks import bias_loss, engine, shapes
from biasloss_ext.benchmarks.results import Group
from biasloss_ext.benchmarks.table import Table

CPU = torch.device("cpu")
# Those that need no compiler and no other package.
CONTENDERS = (
    "biasloss_ext",
    "biasloss_ext, variance given",
    "authors, eager",
    "cross_entropy",
    "features.sum() + cross_entropy",
)
WORKLOADS = shapes.workloads("bias_loss", "cpu", quick=True)
SECONDS = 10.0  # for each workload, at most


def time_losses(repeats: int, after_workload: Callable[[], None] = lambda: None) -> list[Group]:
    """The contenders take turns, forward and backward, once for each of `WORKLOADS`.

    Args:
        repeats: samples of each contender, at most.
        after_workload: called after each workload.
    """
    chosen = tuple(contender for contender in bias_loss.CONTENDERS if contender.name in CONTENDERS)
    plan = engine.Plan(visits=1, seconds=SECONDS, most_rounds=repeats)
    groups = []
    for workload in WORKLOADS:
        groups.append(engine.measure(bias_loss.OP._replace(contenders=chosen), workload, CPU, plan))
        after_workload()
    return groups


def timing_lines(groups: Sequence[Group]) -> list[str]:
    """The table as lines of Markdown."""
    names = [entry.name for entry in groups[0].entries]
    rows = []
    for group in groups:
        medians = [entry.median() for entry in group.entries]
        cells = [f"{1e3 * median:.3f} ({median / medians[0]:.2f})" for median in medians]
        rows.append((f"{group.shape.replace('/', ', ')} classes, {group.layout}", *cells))
    return [
        f"Forward and backward, float32, median milliseconds; in brackets how many times the time of {names[0]}.",
        f"{torch.get_num_threads()} CPU threads.",
        "",
        *Table("", ("features", *names), rows).markdown().splitlines(),
    ]
