"""Whether two recipes differ, from their accuracies over the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Difference:
    """The paired difference of two recipes, first minus second, over the seeds.

    Attributes:
        first, second: names of the two.
        mean: mean of the differences.
        low, high: ends of its confidence interval.
        confidence: of that interval, in (0, 1).
        seeds: how many pairs.
    """

    first: str
    second: str
    mean: float
    low: float
    high: float
    confidence: float
    seeds: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """One sentence; it claims nothing that the spread over the seeds covers."""
        if self.seeds < 2:
            return "one seed alone: no statement"
        if not self.shown:
            return "no difference is shown"
        better, worse = (self.first, self.second) if self.mean > 0 else (self.second, self.first)
        return f"{better} is better than {worse}"


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds (divisor n - 1); NaN for one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def paired_difference(
    first: str,
    second: str,
    first_values: Sequence[float],
    second_values: Sequence[float],
    *,
    resolution: float,
    comparisons: int = 1,
) -> Difference:
    """The difference of two recipes, with the confidence interval of Student's t over the pairs.

    Args:
        first_values, second_values: one number a seed, in the same order.
        resolution: the least step of such a number: 1 / test images for an accuracy. The deviation of the differences is
            taken to be at least this; otherwise a few runs that happen to differ by the same number of images would make
            an interval of width 0.
        comparisons: how many are made in all: the confidence is 1 - 0.05 / comparisons (Bonferroni), so that 95% holds for
            all of them together.

    Raises:
        ValueError: the numbers do not pair up.
    """
    if len(first_values) != len(second_values) or not first_values:
        raise ValueError(f"one value of each for every seed, got {len(first_values)} and {len(second_values)}")
    differences = [a - b for a, b in zip(first_values, second_values, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    confidence = 1 - 0.05 / comparisons
    if count == 1:
        return Difference(first, second, mean, -math.inf, math.inf, confidence, count)
    error = max(spread(differences), resolution) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return Difference(first, second, mean, mean - reach, mean + reach, confidence, count)
