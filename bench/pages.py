"""``python -m bench.pages``: docs/performance.md, the chart and the tables of README.md, from the newest runs in bench/results.

A run is a folder with the results.json that ``biasloss bench`` wrote. For each kind of device and each op the newest run
that has the op is shown. ``--check`` writes nothing and fails where a page differs from what would be written.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import memory, pipeline, readme_chart, time_to_accuracy
from biasloss_ext.benchmarks import noise, plots, results, table
from biasloss_ext.benchmarks.results import Group, Results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SPEED = ("<!-- begin: written by python -m bench.pages -->", "<!-- end: written by python -m bench.pages -->")
CHART = (
    "<!-- begin chart: written by python -m bench.pages -->",
    "<!-- end chart: written by python -m bench.pages -->",
)
NO_GPU = (
    "**These kernels have not run on a GPU yet, so their speed is not measured.** On a machine with a GPU, `python -m "
    "bench.gpu_suite --out DIR` builds, tests and measures in under nine minutes."
)
AUTHORS = "authors, eager"
FLOOR = "features.sum() + cross_entropy"


@dataclass(frozen=True)
class Run:
    folder: Path
    found: Results


def all_runs() -> list[Run]:
    """The oldest first."""
    runs = [Run(path.parent, results.load(path)) for path in RESULTS.glob(f"*/{results.FILE_NAME}")]
    return sorted(runs, key=lambda run: (run.found.date, run.folder.name))


def newest(runs: list[Run]) -> dict[tuple[str, str], Run]:
    """The newest run of each kind of device and op."""
    chosen: dict[tuple[str, str], Run] = {}
    for run in runs:
        for group in run.found.groups:
            chosen[run.found.device["type"], group.op] = run
    return chosen


def readme_section(chosen: dict[tuple[str, str], Run]) -> str:
    """The table of the loss on CPUs, and the network's where it is measured."""
    parts = []
    run = chosen.get(("cpu", "bias_loss"))
    if run is not None:
        parts.append(
            f"Bias Loss, forward and backward, {machine_of(run.found)}. The figures are medians; the contenders take turns, "
            "each time with other features:"
        )
        parts.append(loss_table(run.found).markdown())
    run = chosen.get(("cpu", "skipblocknet"))
    if run is not None:
        table_of = network_table(network_groups(run))
        parts += [f"SkipblockNet-M at 224 x 224, {machine_of(run.found)}:", table_of.markdown()]
    if not any(device == "cuda" for device, _ in chosen):
        parts.append(NO_GPU)
    parts.append("All figures, with plots: [docs/performance.md](docs/performance.md).")
    return "\n\n".join(parts)


def chart_section(chosen: dict[tuple[str, str], Run]) -> str:
    """The chart and its claims; nothing without a run of the network on a CPU."""
    run = chosen.get(("cpu", "skipblocknet"))
    if run is None:
        return ""
    groups = network_groups(run)
    return "\n\n".join(
        [
            f"![SkipblockNet-M: training step, inference, memory]({readme_chart.PATH})",
            f"SkipblockNet-M at 224 x 224, float32, {machine_of(run.found)}, medians:",
            "\n".join(readme_chart.claims(groups)),
        ]
    )


def network_groups(run: Run) -> list[Group]:
    return [group for group in run.found.groups if group.op == "skipblocknet"]


def loss_table(found: Results) -> table.Table:
    rows = []
    for group in found.groups:
        ours, authors, floor = group.ours, group.entry(AUTHORS), group.entry(FLOOR)
        plain = group.op == "bias_loss" and group.backward and not group.axis and not group.one_set
        if not plain or group.dtype != "float32" or ours is None:
            continue
        cells = [group.shape.replace("/", ", "), group.layout, table.duration(ours.median())]
        for entry in (authors, floor):
            ratio = "" if entry is None else f" ({entry.median() / ours.median():.2g}x)"
            cells.append("not measured" if entry is None else table.duration(entry.median()) + ratio)
        rows.append(tuple(cells))
    head = ("features, classes", "layout", "FusedBiasLoss", "authors' formulation", "`features.sum()` + cross-entropy")
    return table.Table("", head, rows)


def network_table(groups: list[Group]) -> table.Table:
    """A row a contender, a column a workload."""
    names = list(dict.fromkeys(entry.name for group in groups for entry in group.entries))
    rows = []
    for name in names:
        cells = [name]
        for group in groups:
            listed = next((entry for entry in group.entries if entry.name == name), None)
            if listed is None:
                cells.append("")
            else:
                cells.append(table.duration(listed.median()) if listed.timed else listed.status)
        rows.append(tuple(cells))
    head = tuple(f"{group.batch} x {'training' if group.backward else 'inference'}" for group in groups)
    return table.Table("", ("contender", *head), rows)


def performance_page(chosen: dict[tuple[str, str], Run]) -> str:
    lines = [
        "# Performance",
        "",
        "`python -m bench.pages` writes this page from the runs in `bench/results`. To measure on your machine, run `biasloss",
        "bench`.",
        "",
        "The inputs are random and fresh. The result of every contender is compared with float64 before it is timed. Contenders",
        "take turns in a changing order, on several sets of inputs if one would stay in a cache. The figures are medians, with",
        "quartiles. The ± of a ratio is half of its range over the visits of a run. The ceilings are those of the same machine",
        "in the same run.",
    ]
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        lines += ["", f"## {title}"]
        runs: dict[Path, tuple[Run, list[str]]] = {}
        for (kind, op), run in sorted(chosen.items()):
            if kind == device:
                runs.setdefault(run.folder, (run, []))[1].append(op)
        if not runs:
            lines += ["", NO_GPU if device == "cuda" else "Not yet measured."]
        for run, ops in runs.values():
            lines += ["", *run_section(run, ops)]
    for part in (memory, pipeline, time_to_accuracy):
        section = part.section(RESULTS / part.RESULTS.name)
        lines += ["", *section] if section else []
    return "\n".join(lines) + "\n"


def run_section(run: Run, ops: list[str]) -> list[str]:
    found = run.found
    place = Path("..") / run.folder.relative_to(ROOT)
    ceilings = [
        f"{name.replace('_', ' ')} {value / 1e9:.3g} {'GFLOP/s' if name.startswith('matmul') else 'GB/s'}"
        for name, value in found.ceilings.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    lines = [
        f"### {', '.join(ops)}: {machine_of(found)}",
        "",
        f"Ceilings: {', '.join(ceilings)}. Versions: {versions}. Data: [{results.FILE_NAME}]({place}/{results.FILE_NAME}).",
    ]
    complaints = noise.complaints(found)
    if complaints:
        lines += ["", *complaints]
    for op in ops:
        groups = [group for group in found.groups if group.op == op]
        part = Results(**{**vars(found), "groups": groups})
        clocks = ("wall", "gpu") if found.device["type"] == "cuda" else ("wall",)
        for clock in clocks:
            lines += ["", f"#### {op}, {clock} time", "", table.summary(part, clock).markdown()]
        if table.missing(part).rows:
            lines += ["", "Not measured:", "", table.missing(part).markdown()]
        drawn = [run.folder / f"{kind}-{op}.png" for kind in ("ratios", "scaling", "memory")]
        lines += [""] + [f"![{path.stem}]({place}/{path.name})" for path in drawn if path.exists()]
        lines += ["", f"<details><summary>every contender of {op}</summary>"]
        for group in groups:
            lines += ["", f"**{group.name}**, {group.sets} sets of inputs"]
            for clock in clocks:
                lines += ["", table.details(group, clock).markdown()]
        lines += ["", "</details>"]
    if (run.folder / "roofline.png").exists():
        lines += ["", f"![roofline]({place}/roofline.png)"]
    return lines


def machine_of(found: Results) -> str:
    device = found.device
    cores = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    return f"{device['name']}{cores}, torch {found.versions['torch']}, {found.date[:10]}"


def with_section(text: str, section: str, markers: tuple[str, str] = SPEED) -> str:
    """``text`` with what lies between the markers replaced."""
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not (begin and end):
        raise SystemExit(f"README.md lacks the markers {' and '.join(markers)}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def pages(chosen: dict[tuple[str, str], Run]) -> dict[Path, str]:
    """What each page should hold."""
    readme = ROOT / "README.md"
    return {
        readme: with_section(with_section(readme.read_text(), readme_section(chosen)), chart_section(chosen), CHART),
        ROOT / "docs" / "performance.md": performance_page(chosen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not up to date")
    parser.add_argument("--plots", action="store_true", help="draw the plots of every run anew")
    arguments = parser.parse_args()
    runs = all_runs()
    chosen = newest(runs)
    network = chosen.get(("cpu", "skipblocknet"))
    if not arguments.check and network is not None:
        readme_chart.draw(network_groups(network), ROOT / readme_chart.PATH)
    if arguments.plots:
        for run in runs:
            plots.draw(run.found, run.folder)
    wanted = pages(chosen)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if arguments.check:
        sys.exit(f"not up to date: {', '.join(path.name for path in stale)}" if stale else 0)
    for path, text in wanted.items():
        path.write_text(text)
    print("written: " + (", ".join(path.name for path in stale) or "nothing, all up to date"))


if __name__ == "__main__":
    main()
