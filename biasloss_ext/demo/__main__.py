"""The command that ``make demo`` runs: training, feature diversity, timings, one report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from biasloss_ext.demo.timings import WORKLOADS, time_losses, timing_lines
from biasloss_ext.errors import UserError
from biasloss_ext.recipes.compare import compare, run_folder
from biasloss_ext.recipes.compare_report import comparison_lines
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.diversity import diversity_lines, measure_diversity
from biasloss_ext.recipes.files import write_text

MODEL = "skipblocknet_xs"


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each run.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with each loss.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each loss, at most.")] = 60,
) -> None:
    """Train SkipblockNet-XS on handwritten digits with Bias Loss and cross-entropy, look at its features, time the loss.

    An interrupted demo resumes when called again; a finished one starts over.
    """
    report = out / "report.md"
    fresh = report.exists()
    report.unlink(missing_ok=True)
    with Display() as display:
        display.say(f"1 of 3: {MODEL} on handwritten digits, Bias Loss against cross-entropy, {seeds} seeds each")
        found = compare(
            out / "comparison",
            models=[MODEL],
            seeds=range(seeds),
            epochs=epochs,
            small_input=True,
            fresh=fresh,
            display=display,
        )
        display.say("2 of 3: the variance of their activations, layer by layer")
        first_seed = [str(run_folder(found.folder, entry.outcomes[0].recipe)) for entry in found.entries]
        diversity = measure_diversity(first_seed, out / "diversity", display=display)
        display.say("3 of 3: what the loss costs")
        display.begin_run("timing the loss", len(WORKLOADS), 0)
        timings = time_losses(repeats, display.step)
        display.end_run()
    lines = [
        "# Bias Loss on handwritten digits",
        "",
        f"{MODEL} on scikit-learn's digits at 32 x 32, {found.recipe.epochs} epochs.",
        "",
        *comparison_lines(found, "comparison/"),
        "",
        "# Feature diversity",
        "",
        f"The two models of seed {found.seeds[0]}. By the threshold of a layer is meant half its median over both models.",
        "",
        *diversity_lines(diversity, "diversity/"),
        "",
        "# What the loss costs",
        "",
        *timing_lines(timings),
    ]
    write_text(report, "\n".join(lines) + "\n")
    console = Console()
    console.print(Markdown("\n".join(lines)))
    console.print(f"written: {report}")


if __name__ == "__main__":
    try:
        typer.run(demo)
    except UserError as error:
        sys.exit(f"biasloss demo: {error}")
