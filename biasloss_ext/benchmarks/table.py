"""Tables of a run, as rows of text: for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from biasloss_ext.benchmarks.noise import Change, spread
from biasloss_ext.benchmarks.results import Group, Results


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary(results: Results, clock: str = "wall") -> Table:
    """Ours, the best peer, their ratio with its spread between visits, and our share of the machine's ceiling."""
    rows = []
    for group in results.groups:
        peer, ours = group.best_peer(clock), group.ours
        if ours is not None and not getattr(ours, clock):
            ours = None
        cells = [group.name, "missing" if ours is None else duration(ours.median(clock))]
        if peer is None:
            cells += ["none", ""]
        elif ours is None:
            cells += [f"{duration(peer.median(clock))}, {peer.name}", ""]
        else:
            ratio = peer.median(clock) / ours.median(clock)
            cells.append(f"{duration(peer.median(clock))}, {peer.name}")
            cells.append(f"{ratio:.3g}x ±{spread(peer, ours, clock) / 2:.0%}")
        share = None if ours is None else results.share(group, ours)
        cells.append("" if share is None else f"{share:.0%} of {group.ceiling}")
        rows.append(tuple(cells))
    title = "wall time" if clock == "wall" else "GPU time"
    return Table(title, ("workload", "ours", "best peer", "ratio", "share of ceiling"), rows)


def details(group: Group, clock: str = "wall") -> Table:
    """Every contender of a group."""
    ours = group.ours
    rows = []
    for entry in group.entries:
        if not entry.timed or not getattr(entry, clock):
            rows.append((entry.name, f"{entry.status}: {entry.reason}" if entry.reason else "not measured", "", "", ""))
            continue
        low, high = entry.quartiles(clock)
        ratio = "" if ours is None else f"{entry.median(clock) / ours.median(clock):.3g}"
        memory = "" if entry.peak_bytes is None else size(entry.peak_bytes)
        rows.append((entry.name, duration(entry.median(clock)), f"{duration(low)} to {duration(high)}", ratio, memory))
    return Table(group.name, ("contender", "median", "quartiles", "times ours", "memory"), rows)


def missing(results: Results) -> Table:
    """Who did not take part, and why; the same reason once for an op."""
    seen: dict[tuple[str, ...], None] = {}
    for group in results.groups:
        for entry in group.entries:
            if entry.status != "ok":
                seen[group.op, entry.name, entry.status, entry.reason] = None
    return Table("not measured", ("op", "contender", "status", "reason"), list(seen))


def comparison(changes: Iterable[Change]) -> Table:
    """What differs between two runs, largest change first; the contenders that stayed the same in one line at the end."""
    listed = list(changes)
    moved = sorted((c for c in listed if c.verdict != "same"), key=lambda c: max(c.ratio, 1 / c.ratio), reverse=True)
    rows = [
        (c.group, c.entry, f"{c.ratio - 1:+.1%}", f"{c.noise:.1%}", c.verdict + (" (not ours)" if c.control else ""))
        for c in moved
    ]
    rows.append((f"{len(listed) - len(moved)} others", "", "", "", "same"))
    return Table("changes of time", ("workload", "contender", "change", "noise", "verdict"), rows)


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
