"""The final report of a training run: Markdown and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from biasloss_ext.recipes.files import whole_file, write_text
from biasloss_ext.recipes.history import Row, accuracy_of, tested
from biasloss_ext.recipes.outcome import Outcome
from biasloss_ext.recipes.recipe import Recipe

NAME = "report.md"
PLOT_NAME = "curves.png"


def write_report(outcome: Outcome) -> None:
    """Writes report.md and curves.png into the folder of the run."""
    save_plot(curves(outcome.history), outcome.folder / PLOT_NAME)
    write_text(outcome.folder / NAME, _text(outcome))


def save_plot(figure: Figure, path: Path) -> None:
    """Writes a plot as a whole or not at all."""
    FigureCanvasAgg(figure)  # a canvas of its own: no window, whatever the user's matplotlib is set to
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def curves(history: list[Row]) -> Figure:
    """Losses and accuracies over the epochs, and for Bias Loss the spread of the weights w_i."""
    weighted = "weight_median" in history[0]
    figure = Figure(figsize=(12 if weighted else 8, 3.5), layout="constrained")
    losses, accuracies, *more = figure.subplots(1, 3 if weighted else 2)
    epochs = [row["epoch"] for row in history]
    tested_epochs = [row["epoch"] for row in tested(history)]

    def series(name: str) -> list[float]:
        return [row[name] for row in history if name in row]

    losses.plot(epochs, series("train_loss"), label="training, the loss trained with")
    losses.plot(tested_epochs, series("test_loss"), label="test, cross-entropy")
    losses.set(xlabel="epoch", ylabel="loss", yscale="log")
    losses.legend()
    accuracies.plot(tested_epochs, [100 * value for value in series("test_accuracy")], label="model")
    if "ema_test_accuracy" in history[-1]:
        accuracies.plot(tested_epochs, [100 * value for value in series("ema_test_accuracy")], label="moving average")
        accuracies.legend()
    accuracies.set(xlabel="epoch", ylabel="test accuracy, %")
    for weights in more:
        for low, high, shade in (("min", "max", 0.15), ("q05", "q95", 0.25), ("q25", "q75", 0.4)):
            weights.fill_between(
                epochs,
                series(f"weight_{low}"),
                series(f"weight_{high}"),
                color="tab:blue",
                alpha=shade,
                linewidth=0,
                label=f"{low} to {high}",
            )
        weights.plot(epochs, series("weight_median"), color="black", label="median")
        weights.set(xlabel="epoch", ylabel="weight $w_i$ of Bias Loss")
        weights.legend()
    return figure


def recipe_table(recipe: Recipe, without: Sequence[str] = ()) -> list[str]:
    """The lines of a table of every choice."""
    choices = {name: value for name, value in recipe.as_dict().items() if name not in without}
    rows = (f"| {name.replace('_', ' ')} | {value} |" for name, value in choices.items())
    return ["| choice | value |", "| --- | --- |", *rows]


def _text(outcome: Outcome) -> str:
    recipe, last = outcome.recipe, outcome.history[-1]
    best = max(tested(outcome.history), key=accuracy_of)
    lines = [
        f"# {recipe.model} on {recipe.data} with {recipe.loss}",
        "",
        f"Test accuracy after the last epoch: **{outcome.accuracy:.2%}** of {outcome.test_images} images"
        f" (best epoch: {accuracy_of(best):.2%}, epoch {best['epoch']}).",
        f"{recipe.epochs} epochs, {sum(row['seconds'] for row in outcome.history):.0f} s of training steps.",
        "",
        f"![loss and accuracy over the epochs]({PLOT_NAME})",
        "",
        "## Last epoch",
        "",
        "| figure | value |",
        "| --- | --- |",
        *(f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in last.items()),
        "",
        "## Recipe",
        "",
        *recipe_table(recipe),
    ]
    if outcome.left_out:
        lines += ["", "## Broken files, left out", "", "| file | reason |", "| --- | --- |"]
        lines += [f"| {path} | {reason} |" for path, reason in outcome.left_out]
    return "\n".join(lines) + "\n"
