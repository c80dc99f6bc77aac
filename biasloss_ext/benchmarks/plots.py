"""Plots of a run: ratio bars, roofline, scaling, memory. One file each; what the run has no data for is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from biasloss_ext.benchmarks.results import Entry, Group, Results

COLORS = {"ours": "tab:blue", "variant": "tab:cyan", "peer": "tab:orange", "context": "tab:gray"}
MARKERS = {"ours": "o", "variant": "o", "peer": "s", "context": "^"}
BAR_INCHES = 0.22
DPI = 110


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what there is data for into ``folder``.

    Returns:
        The files written.
    """
    written = []
    for op in dict.fromkeys(group.op for group in results.groups):
        groups = [group for group in results.groups if group.op == op]
        for name, draw_one in (("ratios", _ratios), ("memory", _memory), ("scaling", _scaling)):
            figure = draw_one(results, groups)
            if figure is not None:
                written.append(_save(figure, folder / f"{name}-{op}.png"))
    figure = _roofline(results)
    if figure is not None:
        written.append(_save(figure, folder / "roofline.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _where(results: Results) -> str:
    return f"{results.device['name']}, {results.date[:10]}"


def _short(group: Group) -> str:
    return group.name.removeprefix(f"{group.op} ")


def _ratios(results: Results, groups: list[Group]) -> Any:
    shown = [group for group in groups if group.ours is not None and not group.axis]
    return _bars(
        shown,
        lambda group, entry: entry.median() / group.ours.median(),  # type: ignore[union-attr]
        f"{groups[0].op}: wall time over ours ({_where(results)})",
        baseline=1.0,
    )


def _memory(results: Results, groups: list[Group]) -> Any:
    shown = [group for group in groups if not group.axis and any(entry.peak_bytes for entry in group.entries)]
    return _bars(
        shown,
        lambda group, entry: entry.peak_bytes / 1e6 if entry.peak_bytes else None,
        f"{groups[0].op}: memory of one step beyond its inputs, MB ({_where(results)})",
    )


def _bars(
    groups: list[Group], value: Callable[[Group, Entry], float | None], title: str, baseline: float | None = None
) -> Any:
    """Horizontal bars on a logarithmic axis, a block for each group."""
    bars: list[tuple[float, float, str, str]] = []
    headings = []
    position = 0.0
    for group in groups:
        measured = [(entry, value(group, entry)) for entry in group.entries if entry.timed]
        heights = [(entry, height) for entry, height in measured if height]
        if not heights:
            continue
        headings.append((position, _short(group)))
        for entry, height in heights:
            position += 1
            bars.append((position, height, entry.name, COLORS[entry.role]))
        position += 1.6
    if not bars:
        return None
    figure = _figure(9, 1 + BAR_INCHES * (position + 1))
    axes = figure.subplots()
    positions, widths, names, colors = zip(*bars, strict=True)
    axes.barh(positions, widths, color=colors, height=0.8)
    axes.set_xscale("log")
    for place, width in zip(positions, widths, strict=True):
        axes.text(width, place, f" {width:.3g}", va="center", fontsize=7)
    for place, heading in headings:
        axes.text(0, place, heading, transform=axes.get_yaxis_transform(), fontsize=8, weight="bold", va="center")
    axes.set_yticks(positions, names, fontsize=7)
    axes.set_ylim(position - 0.5, -0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 1.3)
    if baseline is not None:
        axes.axvline(baseline, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    return figure


def _scaling(results: Results, groups: list[Group]) -> Any:
    groups = [group for group in groups if any(entry.timed for entry in group.entries)]
    sweeps = [name for name in ("batch", "classes") if sum(group.axis == name for group in groups) > 1]
    if not sweeps:
        return None
    figure = _figure(6 * len(sweeps), 5)
    for axes, name in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        points = sorted((group for group in groups if group.axis == name), key=lambda group: getattr(group, name))
        for entry in points[0].entries:
            found = [(getattr(group, name), group.entry(entry.name)) for group in points]
            line = [(x, *timed.quartiles(), timed.median()) for x, timed in found if timed is not None]
            if line:
                xs, lows, highs, medians = zip(*line, strict=True)
                style = "--" if entry.role == "context" else "-"
                axes.plot(xs, [1e3 * m for m in medians], style, marker=MARKERS[entry.role], ms=4, label=entry.name)
                axes.fill_between(xs, [1e3 * v for v in lows], [1e3 * v for v in highs], alpha=0.15)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="milliseconds")
        axes.legend(fontsize=7)
    figure.suptitle(f"{groups[0].op} ({_where(results)})", fontsize=9)
    return figure


def _roofline(results: Results) -> Any:
    """Arithmetic intensity against achieved FLOP/s, ours and the best peer, below what the machine can do."""
    products = {name: value for name, value in results.ceilings.items() if name.startswith("matmul")}
    points = [
        (group, entry)
        for group in results.groups
        for entry in (group.ours, group.best_peer())
        if entry is not None and not group.axis
    ]
    if not points:
        return None
    figure = _figure(8, 5.5)
    axes = figure.subplots()
    memory = max(results.ceilings["read"], results.ceilings["copy"])
    intensities = [group.flops / group.bytes for group, _ in points]
    low, high = min(intensities) / 3, max(*intensities, max(products.values()) / memory) * 3
    for name, ceiling in products.items():
        ridge = ceiling / memory
        axes.plot([low, ridge, high], [low * memory, ceiling, ceiling], color="black", linewidth=1)
        axes.annotate(f"{name}, {ceiling / 1e9:.3g} GFLOP/s", (high, ceiling), ha="right", va="bottom", fontsize=7)
    axes.annotate(f"memory, {memory / 1e9:.3g} GB/s", (low, low * memory), fontsize=7, rotation=30, va="bottom")
    ops = list(dict.fromkeys(group.op for group, _ in points))
    labeled = set()
    for group, entry in points:
        seconds = entry.median("gpu") if entry.gpu else entry.median()
        label = f"{group.op}, {'ours' if entry.role == 'ours' else 'best peer'}"
        axes.plot(
            group.flops / group.bytes,
            group.flops / seconds,
            marker="o" if entry.role == "ours" else "x",
            color=f"C{ops.index(group.op)}",
            linestyle="none",
            label=None if label in labeled else label,
        )
        labeled.add(label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of the least traffic", ylabel="FLOP/s", xlim=(low, high))
    axes.legend(fontsize=7)
    axes.set_title(f"Roofline ({_where(results)})", fontsize=9)
    return figure
