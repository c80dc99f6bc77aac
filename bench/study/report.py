"""docs/study.md and its plots, from the results alone."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.pages import with_section
from bench.study import plots, records
from bench.study.plan import DATA, PARTS, WHOLE_RUN, Part
from bench.study.records import Found, Record
from bench.study.runner import RESULTS
from biasloss_ext.benchmarks.table import Table
from biasloss_ext.recipes.data.idx import FASHION_CLASSES
from biasloss_ext.recipes.statistics import Difference

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, TRAINING, IMAGES = "study.md", "training.md", "images"
MARKERS = (
    "<!-- begin: written by python -m bench.study report -->",
    "<!-- end: written by python -m bench.study report -->",
)
CLAIMED = 0.92  # accuracy that the page on training speaks of
INTRODUCTION = """\
# Study: does Bias Loss help?

`python -m bench.study report` writes this page from the files in `bench/study/results`, one per training run. All runs train on
Fashion-MNIST (70,000 images of ten kinds of clothes) through the recipes of [`biasloss train`](training.md). They are
tested on its 10,000 test images, after the last epoch.

Runs with one seed see the same images, labels, order and augmentation, and start from the same weights, so differences are
taken in pairs. The interval is Student's t over the seeds, and holds for all differences of a table together in 95 cases of
100 (Bonferroni). A difference is *shown* if its interval excludes 0. "No difference is shown" does not say that there is none:
the interval says how large it may be. The intervals of separate tables are not corrected for each other."""
RELATIONS = """\
## (e) What the variance says about an image

Bias Loss weights an image by the variance of its last feature map. These are figures of trained networks, means over the
seeds. *Loss* and *margin*: rank correlation (Spearman) of the variance with the cross-entropy, and with the score of the
right class minus the highest other, on test images. *Class*: the share of the variance's spread that lies between classes
rather than within them. *Misclassified*: the probability that a test image classified wrongly has a higher variance than
one classified rightly. *Wrong label*: the same for training images whose label is wrong on purpose. In the last two columns
0.5 means that the variance says nothing, and above 0.5 that Bias Loss gives such images more weight."""
CLASSES = """\
The mean variance of each class, beside that of all test images. Above 1, Bias Loss gives the class more weight than others."""
LAYERS = """\
The variance of a test image's activations in each layer, as in [feature diversity](diversity.md): the line is the
median, the band reaches from 5% to 95% of the images. Both are means over the seeds."""


def page(found: Sequence[Found], drawn: Sequence[str]) -> str:
    lines = [INTRODUCTION, "", *summary(found)]
    if plots.DIFFERENCES in drawn:
        lines += ["", _image("paired differences in test accuracy", plots.DIFFERENCES)]
    for part in PARTS:
        lines += ["", *part_lines(part, [setting for setting in found if setting.part is part])]
        if part.letter == "d" and plots.GRID in drawn:
            lines += ["", _image("test accuracy by alpha and beta", plots.GRID)]
    if plots.CURVES in drawn:
        lines += [
            "",
            "## Curves",
            "",
            "Means over the seeds. The training loss is the one that is trained with, so losses of",
        ]
        lines += ["different kinds differ in scale.", "", _image("training loss and test accuracy", plots.CURVES)]
    lines += ["", RELATIONS, "", relations_table(found).markdown(), "", CLASSES, "", classes_table(found).markdown()]
    if plots.LAYERS in drawn:
        lines += ["", LAYERS, "", _image("variance of activations layer by layer", plots.LAYERS)]
    return "\n".join([*lines, "", *running(found)]) + "\n"


def summary(found: Sequence[Found]) -> list[str]:
    """What is shown, and what is not."""
    listed = [(setting, difference) for setting in found for difference in setting.differences()]
    shown = [pair for pair in listed if pair[1].shown]
    judged = [pair for pair in listed if pair[1].seeds > 1]
    finished, planned = sum(s.finished for s in found), sum(s.planned for s in found)
    lines = ["## Summary", "", f"{finished} of {planned} planned runs are finished."]
    if judged:
        lines[-1] += f" Of {len(judged)} differences with two seeds or more, {len(shown)} are shown."
    if shown:
        lines += [""] + [
            f"- ({setting.part.letter}) {setting.setting.title}: **{difference.verdict}** by"
            f" {abs(100 * difference.mean):.2f} points ({_interval(difference)}), {difference.seeds} seeds."
            for setting, difference in shown
        ]
    hidden = [(setting, difference) for setting, difference in judged if not difference.shown]
    against = [(s, d) for s, d in hidden if {d.first, d.second} == {"bias", "ce"}]
    if against:
        lines += ["", "Between Bias Loss and cross-entropy no difference is shown in these settings:", ""]
        lines += [
            f"- ({s.part.letter}) {s.setting.title}: {100 * d.mean:+.2f} points ({_interval(d)}), {d.seeds} seeds."
            for s, d in against
        ]
    return lines


def part_lines(part: Part, found: Sequence[Found]) -> list[str]:
    lines = [f"## ({part.letter}) {part.title}", "", part.text]
    for setting in found:
        lines += ["", f"### {setting.setting.title}", ""]
        if not setting.finished:
            lines.append("Not run yet.")
            continue
        if setting.finished < setting.planned:
            lines += [f"{setting.finished} of {setting.planned} planned runs are finished.", ""]
        lines += [accuracy_table(setting).markdown()]
        if setting.differences():
            lines += ["", differences_table(setting.differences()).markdown()]
    return lines


def accuracy_table(found: Found) -> Table:
    """A row per variant."""
    rows = []
    for variant in found.setting.variants:
        accuracies = found.accuracies(variant)
        if not accuracies:
            rows.append((variant, "0", "", "", "", "", ""))
            continue
        deviation = found.spread(variant)
        rows.append(
            (
                variant,
                str(len(accuracies)),
                f"{100 * (found.mean(variant, 'accuracy') or 0):.2f}",
                "" if math.isnan(deviation) else f"{100 * deviation:.2f}",
                _figure(found.last(variant, "test_loss"), ".3f"),
                _figure(found.last(variant, "train_loss"), ".3f"),
                _figure(found.last(variant, "weight_mean"), ".3f"),
            )
        )
    head = ("variant", "seeds", "test accuracy, %", "spread", "test cross-entropy", "training loss", "mean weight")
    return Table("", head, rows)


def differences_table(differences: Sequence[Difference]) -> Table:
    rows = [
        (
            f"{difference.first} minus {difference.second}",
            str(difference.seeds),
            f"{100 * difference.mean:+.2f}",
            _interval(difference),
            difference.verdict,
        )
        for difference in differences
    ]
    return Table("", ("difference", "seeds", "points", "interval", "reading"), rows)


def relations_table(found: Sequence[Found]) -> Table:
    rows = []
    for setting in found:
        if setting.part.letter == "d":
            continue
        for variant, runs in setting.records.items():
            if runs:
                figures = [
                    setting.mean(variant, "analysis", "test", name)
                    for name in ("loss", "margin", "class_share", "misclassified")
                ]
                wrong = setting.mean(variant, "analysis", "train", "wrong_label")
                where = f"({setting.part.letter}) {setting.setting.title}"
                rows.append((where, variant, str(len(runs)), *(_figure(f, ".2f") for f in (*figures, wrong))))
    return Table("", ("setting", "variant", "seeds", "loss", "margin", "class", "misclassified", "wrong label"), rows)


def classes_table(found: Sequence[Found]) -> Table:
    """The variants that the first of a setting's differences compares."""
    rows = []
    for setting in found:
        pairs = setting.setting.pairs if setting.part.letter != "d" else ()
        for variant in pairs[0] if pairs else ():
            means = [record["analysis"]["test"]["class_means"] for record in setting.records[variant].values()]
            if means:
                figures = (f"{statistics.fmean(column):.2f}" for column in zip(*means, strict=True))
                rows.append((f"({setting.part.letter}) {setting.setting.title}", variant, *figures))
    return Table("", ("setting", "variant", *FASHION_CLASSES), rows)


def running(found: Sequence[Found]) -> list[str]:
    """How to run the study, and where its runs ran."""
    machines: dict[str, int] = {}
    for setting in found:
        for runs in setting.records.values():
            for record in runs.values():
                machines[_machine(record)] = machines.get(_machine(record), 0) + 1
    return [
        "## Running it",
        "",
        "Debian's package `dataset-fashion-mnist` has the data. A command trains what has no results yet, and resumes what was",
        "interrupted. Several commands can share the work: each run is taken by one of them.",
        "",
        "```",
        "python -m bench.study list",
        "python -m bench.study run --part b --data-dir DIR",
        "python -m bench.study report",
        "```",
        "",
        "The paper's table for CIFAR-100 is [one command](training.md#comparing).",
        *(["", "The runs so far:", ""] if machines else []),
        *(f"- {count} on {name}" for name, count in sorted(machines.items())),
    ]


def whole_run(found: Sequence[Found]) -> str | None:
    """What `biasloss train` reaches on Fashion-MNIST; None before that run is finished."""
    (setting,) = (setting for setting in found if setting.setting.name == WHOLE_RUN)
    record = setting.records["bias"].get(0)
    if record is None:
        return None
    epochs = record["recipe"]["epochs"]
    reached = next((row["epoch"] for row in record["history"] if row["test_accuracy"] >= CLAIMED), None)
    when = "" if reached is None else f", and {CLAIMED:.0%} first after epoch {reached}"
    return "\n".join(
        [
            f"On Fashion-MNIST, SkipblockNet-XS with Bias Loss reached **{record['accuracy']:.2%}** of the 10,000 test images",
            f"after {epochs} epochs{when}: one run of this command, with seed 0, on {_machine(record)}. The [study](study.md)",
            "has other seeds and losses.",
            "",
            "```bash",
            f"biasloss train --data {DATA} --data-dir data --epochs {epochs} --out runs/fashion",
            "```",
        ]
    )


def pages(found: Sequence[Found], drawn: Sequence[str], docs: Path) -> dict[Path, str]:
    """What each page should hold; the page on training is left alone until its run is finished."""
    written = {docs / PAGE: page(found, drawn)}
    run, training = whole_run(found), docs / TRAINING
    if run is not None and training.exists():
        written[training] = with_section(training.read_text(), run, MARKERS)
    return written


def main(check: bool = False, results: Path = RESULTS, docs: Path = DOCS) -> int:
    """Writes the pages and the plots, or with ``check`` returns 1 if a page is not up to date."""
    found = records.load(results)
    if check:
        names = (plots.DIFFERENCES, plots.CURVES, plots.GRID, plots.LAYERS)
        drawn = [name for name in names if (docs / IMAGES / name).exists()]
        stale = [p.name for p, text in pages(found, drawn, docs).items() if not p.exists() or p.read_text() != text]
        if stale:
            print(f"not up to date: {', '.join(stale)}; run `python -m bench.study report`", file=sys.stderr)
        return int(bool(stale))
    written = pages(found, plots.draw(found, docs / IMAGES), docs)
    for path, text in written.items():
        path.write_text(text)
    print(f"written: {', '.join(path.name for path in written)}")
    return 0


def _machine(record: Record) -> str:
    device = record["environment"]["device"]
    count = device.get("threads")
    threads = "" if count is None else f", {count} thread{'s' * (count > 1)}"
    return f"{device['name']}{threads}, torch {record['environment']['torch']}"


def _image(text: str, name: str) -> str:
    return f"![{text}]({IMAGES}/{name})"


def _interval(difference: Difference) -> str:
    return "" if difference.seeds < 2 else f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
