"""What a ratio is worth: how much it differs between the visits of a run, and between two runs.

A visit measures every contender of a group in turns, with inputs of its own. Ratios are taken inside a visit, where a
slow moment of the machine hits all contenders alike; how they differ between visits is the noise of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from biasloss_ext.benchmarks.results import Entry, Group, Results

AGREEMENT = 0.15  # by which the ratios of two runs may differ
NOISY_SPREAD = 0.10  # of a ratio between the visits of one run: with more, two runs may well differ by more than 15%
BUSY_LOAD = 0.75  # processes that wanted to run, a core, before the benchmarks began
SMALLEST_CHANGE = 0.05  # less is not called a change
FEWEST_CONTROLS = 8  # to judge by what did not change
CONTROL_SIGMAS = 3.0
NORMAL_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
# Student's t for a two-sided test at 1%, by degrees of freedom.
STUDENT = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17)


def log_ratios(entry: Entry, ours: Entry, clock: str = "wall") -> np.ndarray:
    """log(time of ``entry`` / time of ``ours``) of each visit."""
    return np.asarray(np.log(entry.visit_medians(clock) / ours.visit_medians(clock)))


def spread(entry: Entry, ours: Entry, clock: str = "wall") -> float:
    """By how much the largest ratio of a visit exceeds the smallest, relative; 0 for a single visit."""
    ratios = log_ratios(entry, ours, clock)
    return float(np.expm1(ratios.max() - ratios.min()))


def complaints(results: Results) -> list[str]:
    """Why not to believe a run, in words; empty for a quiet machine."""
    said = []
    if results.load_before is not None and results.load_before > BUSY_LOAD:
        said.append(f"The machine was busy when the run began: {results.load_before:.2f} processes a core.")
    noisy = []
    for group in results.groups:
        peer = group.best_peer()
        if group.ours is not None and peer is not None and spread(peer, group.ours) > NOISY_SPREAD:
            noisy.append(f"{group.name} ({spread(peer, group.ours):.0%})")
    if noisy:
        said.append(
            f"The machine was too noisy: ratios that differ by more than {NOISY_SPREAD:.0%} from visit to visit, and may "
            f"differ by more than {AGREEMENT:.0%} in another run: {', '.join(noisy)}."
        )
    return said


@dataclass
class Change:
    """How one contender's time moved from run A to run B, measured against the others of its group.

    Attributes:
        group, entry: names.
        ratio: time in B over time in A, after what moved the group as a whole is divided out; 1.2 is 20% slower.
        noise: relative change that noise alone may explain.
        control: the contender does not come from this package, and so should not have changed.
    """

    group: str
    entry: str
    ratio: float
    noise: float
    control: bool

    @property
    def verdict(self) -> str:
        if abs(math.log(self.ratio)) <= math.log1p(self.noise):
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def changes(before: Results, after: Results, clock: str = "wall") -> list[Change]:
    """Every contender that both runs timed, with the change of its time and the noise that it has to exceed.

    Each visit's times are divided by those of the controls (peers and what else is not ours) of the same visit. The
    noise is the largest of: 5%; a t interval at 1% from the visits; three robust standard deviations of what the controls,
    which did not change, did between the runs.
    """
    found = []
    groups = {group.name: group for group in before.groups}
    for group in after.groups:
        if group.name in groups:
            found += _changes_of_group(groups[group.name], group, clock)
    controls = [math.log(change.ratio) for change in found if change.control]
    if len(controls) >= FEWEST_CONTROLS:
        between_runs = math.expm1(CONTROL_SIGMAS * NORMAL_MAD * float(np.median(np.abs(controls))))
        for change in found:
            change.noise = max(change.noise, between_runs)
    return found


def disagreements(before: Results, after: Results, clock: str = "wall") -> list[str]:
    """Groups whose ratio of the best peer to ours differs by more than 15%, in words."""
    found = []
    groups = {group.name: group for group in before.groups}
    for group in after.groups:
        old = groups.get(group.name)
        peer = group.best_peer(clock)
        same_peer = None if old is None or peer is None else old.entry(peer.name)
        if old is None or old.ours is None or group.ours is None or peer is None or same_peer is None:
            continue
        ratios = [same_peer.median(clock) / old.ours.median(clock), peer.median(clock) / group.ours.median(clock)]
        if max(ratios) / min(ratios) - 1 > AGREEMENT:
            found.append(f"{group.name}: {ratios[0]:.3g}x and {ratios[1]:.3g}x")
    return found


def _changes_of_group(before: Group, after: Group, clock: str) -> list[Change]:
    both = [(old, new) for new in after.entries if (old := before.entry(new.name)) is not None and new.timed]
    both = [(old, new) for old, new in both if getattr(old, clock) and getattr(new, clock)]
    found = []
    for old, new in both:
        references = [pair for pair in both if _is_control(pair[1]) and pair[1] is not new]
        sides = []
        for side, entry in enumerate((old, new)):
            times = np.log(entry.visit_medians(clock))
            if references:
                times = times - np.median([np.log(pair[side].visit_medians(clock)) for pair in references], axis=0)
            sides.append(times)
        difference = float(np.median(sides[1]) - np.median(sides[0]))
        noise = max(SMALLEST_CHANGE, math.expm1(_interval(*sides)))
        found.append(Change(after.name, new.name, math.exp(difference), noise, _is_control(new)))
    return found


def _is_control(entry: Entry) -> bool:
    return entry.role in ("peer", "context")


def _interval(first: np.ndarray, second: np.ndarray) -> float:
    """Half the width of the t interval of the difference of means, variances pooled; 0 where nothing is known."""
    freedom = len(first) + len(second) - 2
    if freedom < 1:
        return 0.0
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in (first, second))
    error = math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second)))
    return min(STUDENT[min(freedom, len(STUDENT)) - 1] * error, math.log(10))
