"""The finished runs, and what the differences between them show."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.study.plan import PARTS, Part, Run, Setting
from bench.study.runner import check_recipe, result_path
from biasloss_ext.recipes.statistics import Difference, paired_difference, spread

Record = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The finished runs of one setting: ``records[variant][seed]``; a variant without any is there, empty."""

    part: Part
    setting: Setting
    records: Mapping[str, Mapping[int, Record]]

    @property
    def finished(self) -> int:
        return sum(map(len, self.records.values()))

    @property
    def planned(self) -> int:
        return len(self.setting.variants) * len(self.setting.seeds)

    def accuracies(self, variant: str) -> list[float]:
        return [record["accuracy"] for record in self.records[variant].values()]

    def mean(self, variant: str, *path: str) -> float | None:
        """The mean over the seeds of one figure of the records, such as "analysis", "test", "loss"; None without any."""
        values = []
        for record in self.records[variant].values():
            value: Any = record
            for name in path:
                value = None if value is None else value.get(name)
            if value is not None:
                values.append(float(value))
        return statistics.fmean(values) if values else None

    def last(self, variant: str, name: str) -> float | None:
        """The mean over the seeds of a figure of the last epoch."""
        values = [row[name] for record in self.records[variant].values() if name in (row := record["history"][-1])]
        return statistics.fmean(values) if values else None

    def pairs(self, first: str, second: str) -> list[tuple[float, float]]:
        """The accuracies of the seeds that both variants have."""
        ours, theirs = self.records[first], self.records[second]
        return [(ours[seed]["accuracy"], theirs[seed]["accuracy"]) for seed in ours if seed in theirs]

    def differences(self) -> list[Difference]:
        """Those of the setting's pairs that share a seed; their intervals hold together in 95 cases of 100."""
        listed = {pair: self.pairs(*pair) for pair in self.setting.pairs}
        listed = {pair: values for pair, values in listed.items() if values}
        images = min((r["test_images"] for runs in self.records.values() for r in runs.values()), default=1)
        return [
            paired_difference(
                *pair,
                [a for a, _ in values],
                [b for _, b in values],
                resolution=1 / images,
                comparisons=len(self.setting.pairs),
            )
            for pair, values in listed.items()
        ]

    def spread(self, variant: str) -> float:
        return spread(self.accuracies(variant))


def load(results: Path, parts: Sequence[Part] = PARTS) -> list[Found]:
    """Every setting of the study with the runs that have results.

    Raises:
        UserError: a file has the results of another recipe than the plan's.
    """
    found = []
    for part in parts:
        for setting in part.settings:
            records: dict[str, dict[int, Record]] = {}
            for variant in setting.variants:
                records[variant] = {}
                for seed in setting.seeds:
                    run = Run(part, setting, variant, seed)
                    path = result_path(run, results)
                    if path.exists():
                        record = json.loads(path.read_text())
                        check_recipe(run, record, path)
                        records[variant][seed] = record
            found.append(Found(part, setting, records))
    return found
