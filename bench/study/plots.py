"""The plots of the study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.charts import COLORS, GRAY, chart
from bench.study.records import Found

DIFFERENCES, CURVES, GRID, LAYERS = (f"study-{name}.svg" for name in ("differences", "curves", "grid", "layers"))


def draw(found: Sequence[Found], folder: Path) -> list[str]:
    """Draws what there are runs for, and removes the other plots; returns the names of the files."""
    losses = [setting for setting in found if setting.part.letter != "d" and setting.differences()]
    grids = [setting for setting in found if setting.part.letter == "d" and setting.finished]
    diverse = [setting for setting in found if setting.part.letter in "abc" and setting.finished]
    drawn = []
    for name, settings, plot in (
        (DIFFERENCES, losses, differences),
        (CURVES, losses, curves),
        (GRID, grids, grid),
        (LAYERS, _with_layers(diverse), layers),
    ):
        if settings:
            plot(settings, folder / name)
            drawn.append(name)
        else:
            (folder / name).unlink(missing_ok=True)
    return drawn


def differences(found: Sequence[Found], path: Path) -> None:
    """Every paired difference with its interval, a dot per seed."""
    listed = [(setting, setting.differences()) for setting in found]
    rows = [len(of_setting) for _, of_setting in listed]
    with chart(path, 8, 0.7 * len(listed) + 0.28 * sum(rows)) as figure:
        panels = figure.subplots(len(listed), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
        for axes, (setting, of_setting) in zip(panels, listed, strict=True):
            for row, difference in enumerate(of_setting):
                color = COLORS[0] if difference.shown else GRAY
                points = [100 * (a - b) for a, b in setting.pairs(difference.first, difference.second)]
                axes.plot(points, [row] * len(points), "o", color=color, alpha=0.5, markersize=3.5)
                if difference.seeds > 1:
                    axes.plot([100 * difference.low, 100 * difference.high], [row, row], color=color, linewidth=2)
                axes.plot([100 * difference.mean], [row], "|", color=color, markersize=12, markeredgewidth=2.5)
            axes.axvline(0, color=GRAY, linewidth=0.8)
            names = [f"{difference.first} minus {difference.second}" for difference in of_setting]
            axes.set_yticks(range(len(names)), names)
            axes.set(ylim=(len(names) - 0.5, -0.5))
            axes.set_title(f"({setting.part.letter}) {setting.setting.title}", loc="left")
        panels[-1].set_xlabel("difference in test accuracy, points; blue where the interval excludes 0")


def curves(found: Sequence[Found], path: Path) -> None:
    """Training loss and test accuracy over the epochs, means over the seeds."""
    with chart(path, 8, 2.1 * len(found)) as figure:
        panels = figure.subplots(len(found), 2, squeeze=False)
        for (left, right), setting in zip(panels, found, strict=True):
            for variant, runs in setting.records.items():
                if runs:
                    histories = [record["history"] for record in runs.values()]
                    left.plot(*_mean_curve(histories, "train_loss"), label=variant)
                    epochs, accuracy = _mean_curve(histories, "test_accuracy")
                    right.plot(epochs, [100 * value for value in accuracy], marker=".", label=variant)
            left.set_title(f"({setting.part.letter}) {setting.setting.title}", loc="left")
            left.set(ylabel="training loss", yscale="log")
            right.set(ylabel="test accuracy, %")
            right.legend(fontsize=7)
        for axes in panels[-1]:
            axes.set_xlabel("epoch")


def grid(found: Sequence[Found], path: Path) -> None:
    """Test accuracy by alpha and beta, a point per seed."""
    with chart(path, 8, 3) as figure:
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, setting in zip(panels, found, strict=True):
            betas = sorted({options["beta"] for options in setting.setting.variants.values()})
            alphas = sorted({options["alpha"] for options in setting.setting.variants.values()})
            for number, beta in enumerate(betas):
                means = []
                for place, alpha in enumerate(alphas):
                    accuracies = [100 * a for a in setting.accuracies(f"alpha {alpha:g}, beta {beta:g}")]
                    offset = 0.08 * (number - (len(betas) - 1) / 2)
                    axes.plot([place + offset] * len(accuracies), accuracies, ".", color=COLORS[number], alpha=0.5)
                    if accuracies:
                        means.append((place + offset, statistics.fmean(accuracies)))
                if means:
                    axes.plot(*zip(*means, strict=True), color=COLORS[number], label=f"beta {beta:g}")
            axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
            axes.set_title(setting.setting.title, loc="left", fontsize=8)
            axes.set_xlabel("alpha")
        panels[0].set_ylabel("test accuracy, %")
        panels[0].legend(fontsize=8)


def layers(found: Sequence[Found], path: Path) -> None:
    """Median and band of the variance of a test image's activations in each layer, means over the seeds."""
    with chart(path, 8, 2.8 * len(found)) as figure:
        for axes, setting in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
            names: list[str] = []
            for variant, runs in setting.records.items():
                tables = [record["analysis"]["layers"] for record in runs.values()]
                if not tables:
                    continue
                names = max(names, [row["layer"] for row in tables[0]], key=len)
                low, middle, high = (
                    [statistics.fmean(row[quantile] for row in rows) for rows in zip(*tables, strict=True)]
                    for quantile in ("q05", "median", "q95")
                )
                (line,) = axes.plot(middle, marker=".", label=variant)
                axes.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
            axes.set_title(f"({setting.part.letter}) {setting.setting.title}", loc="left")
            axes.set(ylabel="variance", yscale="log")
            axes.legend(fontsize=7)


def _with_layers(found: Sequence[Found]) -> list[Found]:
    """One setting per part, the first that has runs: layers differ little between settings."""
    first: dict[str, Found] = {}
    for setting in found:
        first.setdefault(setting.part.letter, setting)
    return list(first.values())


def _mean_curve(histories: Sequence[Sequence[dict[str, float]]], name: str) -> tuple[list[float], list[float]]:
    epochs = [row["epoch"] for row in histories[0] if name in row]
    columns = zip(*([row[name] for row in history if name in row] for history in histories), strict=True)
    return epochs, [statistics.fmean(column) for column in columns]
