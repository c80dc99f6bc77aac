"""What a run found, as data."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biasloss_ext.errors import UserError

FORMAT = 1
FILE_NAME = "results.json"
Visits = list[list[float]]


@dataclass
class Entry:
    """A contender in a group.

    Attributes:
        name, role: see `contender.Contender`.
        status: "ok", "unavailable", "failed" or "wrong"; nothing but "ok" is timed.
        reason: why not "ok".
        error: relative error against float64.
        wall: seconds a step as the host sees it, one list of samples for each visit.
        gpu: seconds a step on the GPU, likewise; empty on CPUs.
        gpu_method: "CUDA graph" or "sum of kernels".
        peak_bytes: memory of one step beyond its inputs; None where PyTorch's allocator does not see it.
    """

    name: str
    role: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    wall: Visits = field(default_factory=list)
    gpu: Visits = field(default_factory=list)
    gpu_method: str = ""
    peak_bytes: int | None = None

    @property
    def timed(self) -> bool:
        return self.status == "ok" and bool(self.wall)

    def visit_medians(self, clock: str = "wall") -> np.ndarray:
        return np.asarray([np.median(visit) for visit in getattr(self, clock)])

    def samples(self, clock: str = "wall") -> np.ndarray:
        """All samples of "wall" or "gpu"."""
        visits: Visits = getattr(self, clock)
        return np.concatenate([np.asarray(visit) for visit in visits]) if visits else np.empty(0)

    def median(self, clock: str = "wall") -> float:
        return float(np.median(self.samples(clock)))

    def quartiles(self, clock: str = "wall") -> tuple[float, float]:
        low, high = np.quantile(self.samples(clock), (0.25, 0.75))
        return float(low), float(high)


@dataclass
class Group:
    """A workload with its contenders; the fields are those of `contender.Workload` and `contender.Cost`."""

    name: str
    op: str
    shape: str
    batch: int
    classes: int
    dtype: str
    layout: str
    backward: bool
    one_set: bool
    axis: str
    sets: int
    bytes: int
    flops: int
    ceiling: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def ours(self) -> Entry | None:
        return next((entry for entry in self.entries if entry.role == "ours" and entry.timed), None)

    def best_peer(self, clock: str = "wall") -> Entry | None:
        """The fastest that computes the same."""
        peers = [entry for entry in self.entries if entry.role == "peer" and entry.timed and getattr(entry, clock)]
        return min(peers, key=lambda entry: entry.median(clock), default=None)

    @property
    def floor(self) -> Entry | None:
        """The first entry that computes something else."""
        return next((entry for entry in self.entries if entry.role == "context" and entry.timed), None)

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name and entry.timed), None)


@dataclass
class Results:
    """A run."""

    date: str
    quick: bool
    device: dict[str, Any]
    versions: dict[str, str]
    ceilings: dict[str, float]
    load_before: float | None = None
    seconds: float = 0.0
    groups: list[Group] = field(default_factory=list)

    def share(self, group: Group, entry: Entry) -> float | None:
        """The share of the machine's ceiling that a step reaches with the least traffic or arithmetic it needs."""
        seconds = entry.median("gpu") if entry.gpu else entry.median()
        if group.ceiling == "matmul":
            ceiling = self.ceilings.get(f"matmul {group.dtype}")
            return None if ceiling is None else group.flops / seconds / ceiling
        if group.one_set and group.ceiling == "read":
            ceiling = self.ceilings["read_cached"]
        elif group.ceiling == "read":
            ceiling = max(self.ceilings["read"], self.ceilings["copy"])
        else:
            ceiling = self.ceilings["copy"]
        return group.bytes / seconds / ceiling

    def save(self, path: Path) -> None:
        """Write atomically: an interrupted run leaves the file as it was."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        partial.write_text(json.dumps(rounded(data), indent=1) + "\n")
        os.replace(partial, path)


def load(path: Path) -> Results:
    """Read what `Results.save` wrote.

    Raises:
        UserError: no such file, or none of ours.
    """
    try:
        data = json.loads(path.read_text())
        if data.pop("format") != FORMAT:
            raise UserError(
                f"{path} has another format than {FORMAT}; it was written by another version of this package"
            )
        groups = [
            Group(**{**group, "entries": [Entry(**entry) for entry in group["entries"]]})
            for group in data.pop("groups")
        ]
        return Results(**data, groups=groups)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} holds no benchmark results; give a {FILE_NAME} that `biasloss bench` wrote") from None


def rounded(value: Any) -> Any:
    """Six digits are more than clocks know, and keep committed files small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
