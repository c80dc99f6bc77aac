"""The chart at the top of the README, and a line for each of its claims, from the newest runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.charts import COLORS, GRAY, chart
from biasloss_ext.benchmarks.results import Entry, Group

PATH = "docs/images/speed.svg"
OURS = ("biasloss_ext, fused", "biasloss_ext, optimized")
# What people use, as the chart calls it; others stay in the tables.
TITLES = {
    "biasloss_ext, fused": "biasloss_ext",
    "biasloss_ext, optimized": "biasloss_ext",
    "eager channels_last": "PyTorch, channels_last",
    "eager NCHW": "PyTorch",
    "torch.compile": "torch.compile",
    "ONNX Runtime": "ONNX Runtime",
    "OpenVINO": "OpenVINO",
    "ncnn": "ncnn",
}
Figure = Callable[[Entry], float | None]


def milliseconds(entry: Entry) -> float | None:
    return 1e3 * entry.median() if entry.timed else None


def megabytes(entry: Entry) -> float | None:
    return entry.peak_bytes / 1e6 if entry.timed and entry.peak_bytes else None


def panels(groups: Sequence[Group]) -> list[tuple[str, str, dict[str, float]]]:
    """Title, unit and bars of each panel; ``groups`` are those of the network."""
    training = next((group for group in groups if group.backward), None)
    inference = next((group for group in groups if not group.backward and group.batch == 1), None)
    found = []
    if training is not None:
        images = f"{training.batch} images"
        found.append((f"training step, {images}", "ms", _bars(training, milliseconds)))
    if inference is not None:
        left_out = "biasloss_ext, fused"  # before optimize_for_inference
        found.append(("inference, 1 image", "ms", _bars(inference, milliseconds, left_out)))
    if training is not None:
        found.append((f"training memory, {images}", "MB", _bars(training, megabytes)))
    return [panel for panel in found if panel[2]]


def _bars(group: Group, figure: Figure, left_out: str = "") -> dict[str, float]:
    """The figure by the title, the smallest first."""
    bars = {}
    for entry in group.entries:
        value = figure(entry)
        if entry.name in TITLES and entry.name != left_out and value is not None:
            bars[TITLES[entry.name]] = value
    return dict(sorted(bars.items(), key=lambda bar: bar[1]))


def draw(groups: Sequence[Group], path: Path) -> None:
    listed = panels(groups)
    with chart(path, 10, 2.3) as figure:
        for axes, (title, unit, bars) in zip(figure.subplots(1, len(listed), squeeze=False)[0], listed, strict=True):
            colors = [COLORS[0] if name == TITLES[OURS[0]] else GRAY for name in bars]
            drawn = axes.barh(list(bars), list(bars.values()), color=colors, height=0.65)
            axes.bar_label(drawn, [f"{value:.3g}" for value in bars.values()], padding=3)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.2 * max(bars.values()))
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(left=False)
            axes.set_title(f"{title}, {unit}", loc="left")


def claims(groups: Sequence[Group]) -> list[str]:
    """A line per panel: ours, then each of the others as a multiple of it."""
    lines = []
    for title, unit, bars in panels(groups):
        ours = bars.get(TITLES[OURS[0]])
        others = {name: value for name, value in bars.items() if name != TITLES[OURS[0]]}
        if ours is not None and others:
            ratios = "; ".join(f"{name}: {value / ours:.2f}x" for name, value in others.items())
            lines.append(f"- {title[0].upper()}{title[1:]}: **{ours:.3g} {unit}**. Relative to this, {ratios}.")
    return lines
