"""The report of a comparison: Markdown, a table as CSV, plots."""

from __future__ import annotations

import csv
import io
import math
import statistics
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from biasloss_ext.recipes.files import write_text
from biasloss_ext.recipes.history import tested
from biasloss_ext.recipes.report import save_plot
from biasloss_ext.recipes.statistics import Difference, spread

if TYPE_CHECKING:
    from biasloss_ext.recipes.compare import Comparison, Entry

NAME = "report.md"
TABLE_NAME = "runs.csv"
CURVES_NAME = "accuracy.png"
DIFFERENCES_NAME = "differences.png"
_VARIED = ("model", "loss", "seed")


def write_comparison(comparison: Comparison) -> None:
    """Writes report.md, runs.csv, accuracy.png and differences.png into the folder of the comparison."""
    write_text(comparison.folder / TABLE_NAME, runs_csv(comparison))
    save_plot(accuracy_plot(comparison), comparison.folder / CURVES_NAME)
    save_plot(differences_plot(comparison), comparison.folder / DIFFERENCES_NAME)
    recipe = comparison.recipe.as_dict()
    lines = [
        f"# Comparison on {comparison.recipe.data}",
        "",
        *comparison_lines(comparison),
        "",
        "## Recipe of all runs",
        "",
        "| choice | value |",
        "| --- | --- |",
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in recipe.items() if name not in _VARIED),
    ]
    write_text(comparison.folder / NAME, "\n".join(lines) + "\n")


def comparison_lines(comparison: Comparison, plots: str = "") -> list[str]:
    """Tables and plots as lines of Markdown; ``plots`` is what leads from the text to the folder of the plots."""
    seeds = ", ".join(map(str, comparison.seeds))
    return [
        f"Test accuracy after the last epoch, in % of {comparison.test_images} images, for the seeds {seeds}.",
        "The spread is the standard deviation over the seeds.",
        "",
        "| model | loss | each seed | mean | spread |",
        "| --- | --- | --- | --- | --- |",
        *map(_row, comparison.entries),
        "",
        f"![test accuracy over the epochs]({plots}{CURVES_NAME})",
        "",
        "Differences are taken in pairs, run by run with the same seed, the first named minus the other, in points.",
        "The interval is Student's t over the seeds, and holds for all lines of the table together in 95 cases of 100.",
        "",
        "| difference | mean | interval | what it says |",
        "| --- | --- | --- | --- |",
        *map(_difference_row, comparison.differences),
        "",
        f"![paired differences]({plots}{DIFFERENCES_NAME})",
    ]


def _row(entry: Entry) -> str:
    if entry.unavailable is not None:
        return f"| {entry.model} | {entry.loss} | not run: {entry.unavailable} | | |"
    each = ", ".join(f"{100 * accuracy:.2f}" for accuracy in entry.accuracies)
    mean, deviation = statistics.fmean(entry.accuracies), spread(entry.accuracies)
    shown = "" if math.isnan(deviation) else f"{100 * deviation:.2f}"
    return f"| {entry.model} | {entry.loss} | {each} | {100 * mean:.2f} | {shown} |"


def _difference_row(difference: Difference) -> str:
    reach = "" if difference.seeds < 2 else f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}"
    return (
        f"| {difference.first} minus {difference.second} | {100 * difference.mean:+.2f} | {reach}"
        f" | **{difference.verdict}** |"
    )


def runs_csv(comparison: Comparison) -> str:
    """One line a run: model, loss, seed and the figures of its last epoch."""
    runs = [outcome for entry in comparison.entries for outcome in entry.outcomes]
    rows = [{name: getattr(run.recipe, name) for name in _VARIED} | run.history[-1] for run in runs]
    columns = dict.fromkeys(name for row in rows for name in row)  # Bias Loss has figures that others have not
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def accuracy_plot(comparison: Comparison) -> Figure:
    """Test accuracy over the epochs: a thin line a run, a thick one for the mean of an entry."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, entry in enumerate(entry for entry in comparison.entries if entry.outcomes):
        color = f"C{number % 10}"
        curves = [[100 * row["test_accuracy"] for row in tested(outcome.history)] for outcome in entry.outcomes]
        epochs = [row["epoch"] for row in tested(entry.outcomes[0].history)]
        for curve in curves:
            axes.plot(epochs, curve, color=color, alpha=0.35, linewidth=0.8)
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, mean, color=color, linewidth=2, label=entry.name)
    axes.set(xlabel="epoch", ylabel="test accuracy, %")
    axes.legend()
    return figure


def differences_plot(comparison: Comparison) -> Figure:
    """Every paired difference with its interval, and a dot for each seed."""
    accuracies = {entry.name: entry.accuracies for entry in comparison.entries}
    figure = Figure(figsize=(8, 1.5 + 0.6 * len(comparison.differences)), layout="constrained")
    axes = figure.subplots()
    for row, difference in enumerate(comparison.differences):
        pairs = zip(accuracies[difference.first], accuracies[difference.second], strict=True)
        axes.plot([100 * (a - b) for a, b in pairs], [row] * difference.seeds, "o", color="black", alpha=0.4)
        if difference.seeds > 1:
            axes.plot([100 * difference.low, 100 * difference.high], [row, row], color="C0", linewidth=2)
        axes.plot([100 * difference.mean], [row], "|", color="C0", markersize=20, markeredgewidth=3)
    axes.axvline(0, color="black", linewidth=0.8)
    names = [f"{difference.first}\nminus {difference.second}" for difference in comparison.differences]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="difference in test accuracy, points", ylim=(len(names) - 0.5, -0.5))
    return figure
