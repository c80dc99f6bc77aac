"""``python -m bench.study run|list|report``: see docs/study.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.study import report
from bench.study.plan import runs, training_images
from bench.study.runner import RESULTS, Folders, result_path, run_all
from biasloss_ext.errors import UserError


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "train what has no results yet"), ("list", "say which runs have results")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--part", action="append", default=[], help="letter of a part; several times for several")
        command.add_argument("--setting", action="append", default=[], help="name of a setting, likewise")
        command.add_argument("--variant", action="append", default=[], help="name of a variant, likewise")
        command.add_argument("--seed", action="append", type=int, default=[], help="likewise")
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
        if name == "run":
            command.add_argument("--data-dir", required=True, help="folder of Fashion-MNIST")
            command.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of unfinished runs")
            command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command = commands.add_parser("report", help="write docs/study.md and its plots from the results")
    command.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    arguments = parser.parse_args(given)
    try:
        if arguments.command == "report":
            sys.exit(report.main(arguments.check))
        wanted = list(runs(arguments.part, arguments.setting, arguments.variant, arguments.seed))
        if arguments.command == "run":
            done = run_all(wanted, Folders(arguments.data_dir, arguments.work, arguments.results), arguments.device)
            print(f"{done} runs done")
        else:
            missing = [run for run in wanted if not result_path(run, arguments.results).exists()]
            for run in wanted:
                print("missing" if run in missing else "done   ", run.name)
            images = sum(training_images(run) for run in missing)
            print(f"{len(missing)} of {len(wanted)} runs are missing: {images / 1e6:.3g} million images to train on")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
