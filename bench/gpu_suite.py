"""``python -m bench.gpu_suite --out DIR``: everything that needs a GPU, the most valuable first, within a time limit.

Its only output besides the terminal's is ``DIR/results.tgz``, written anew after each stage, so that a suite that is broken off
leaves what it finished: ``summary.md``, ``stages.json``, a log and results for each stage. A library that was carried
ready-built is used where it loads and has code for the GPU; otherwise it is built.

``--dry-run`` runs the same stages on the simulated GPU, with shapes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from bench import archive
from bench.gpu import training_step
from bench.stages import Outcome, Stage, run
from biasloss_ext.benchmarks import noise, results, table

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = "results.tgz"
LIMIT = 540.0  # seconds, all stages together
TEST_WORKERS = 12
DRY_STRETCH = 4.0  # of a stage's limit in a dry run: interpreted kernels, on a CPU that does other things besides
MARGIN = 15.0  # seconds before its limit in which a stage that measures begins nothing new
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
# With its own clock control it would lock the GPU's clocks, for others too.
PROFILER = (
    "ncu",
    "--clock-control",
    "none",
    "--csv",
    "--metrics",
    ",".join(METRICS),
    "--kernel-name-base",
    "demangled",
)


@dataclass(frozen=True)
class Where:
    """A GPU, or the simulated one in a dry run."""

    out: Path
    dry: bool = False

    def stage(
        self, name: str, module: str, limit: float, *options: str, tool: tuple[str, ...] = (), **environment: str
    ) -> Stage:
        """A script of `bench.gpu`; in a dry run it does without ``tool``, and nothing else is different."""
        limit *= DRY_STRETCH if self.dry else 1.0
        given = ["--device", "cpu", "--tiny"] if self.dry else ["--device", "cuda"]
        given += ["--limit", str(max(limit - MARGIN, 1.0)), "--out", str(self.out / f"{name}.json"), *options]
        script = (sys.executable, "-m", f"bench.gpu.{module}", *given)
        if tool and not self.dry:
            return Stage(name, (*tool, *script), limit, environment, needs=tool[0])
        return Stage(name, script, limit, environment)

    def tests(self, limit: float) -> Stage:
        """CUDA's files first, Triton's last: their kernels take minutes to compile. A dry run only collects them."""
        paths = sorted((ROOT / "tests" / "gpu").glob("test_*.py"), key=lambda path: ("triton" in path.name, path.name))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        if self.dry:
            limit *= DRY_STRETCH
            command += ["--collect-only"]
        else:
            command += ["-n", str(TEST_WORKERS), "--maxschedchunk", "2", f"--junitxml={self.out / 'gpu-tests.xml'}"]
        return Stage("gpu-tests", (*command, *(str(path.relative_to(ROOT)) for path in paths)), limit)


def stages(where: Where) -> list[Stage]:
    """All of them, in order. Limits are of each alone; the whole has its own."""
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a cached block would hide what is read beside a tensor
    cuda = ("--backends", "cuda")
    return [
        where.stage("library", "library", 120),
        where.stage("smoke", "smoke", 70),
        where.tests(130),
        where.stage("training", "training_step", 70),
        where.stage("kernels", "kernels", 130),
        where.stage("memcheck", "small_kernels", 50, *cuda, tool=(*SANITIZER, "memcheck"), **no_cache),
        where.stage("racecheck", "small_kernels", 50, *cuda, tool=(*SANITIZER, "racecheck"), **no_cache),
        where.stage("nsight", "small_kernels", 60, "--large", tool=PROFILER),
        where.stage("peers", "training_step", 120, "--peers"),
    ]


def summary(outcomes: list[Outcome], out: Path) -> str:
    """Markdown: the stages, what failed in the smoke test, and the tables of what was measured."""
    shown = table.Table(
        "stages",
        ("stage", "status", "seconds", "last line"),
        [(o.name, o.status, f"{o.seconds:.0f}", o.last_line) for o in outcomes],
    )
    parts = [shown.markdown(), *_failed_checks(out / "smoke.json")]
    steps = [path for name in ("training", "peers") if (path := out / f"{name}.json").exists()]
    parts += [training_step.table(json.loads(path.read_text())) for path in steps]
    if (out / "kernels.json").exists():
        parts += benchmark_summary(results.load(out / "kernels.json"))
    return "\n\n".join(parts) + "\n"


def _failed_checks(path: Path) -> Iterable[str]:
    found = json.loads(path.read_text()) if path.exists() else {}
    return [f"failed: {name}: {check['reason']}" for name, check in found.items() if check["status"] == "failed"]


def benchmark_summary(found: results.Results) -> list[str]:
    parts = [f"{found.device['name']}, {found.date}"]
    clocks = ("wall", "gpu") if found.device["type"] == "cuda" else ("wall",)
    parts += [f"{clock}:\n\n{table.summary(found, clock).markdown()}" for clock in clocks]
    if table.missing(found).rows:
        parts.append("Not measured:\n\n" + table.missing(found).markdown())
    return parts + noise.complaints(found)


def chosen(listed: list[Stage], names: str | None) -> list[Stage]:
    if names is None:
        return listed
    wanted = names.split(",")
    unknown = set(wanted) - {stage.name for stage in listed}
    if unknown:
        sys.exit(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in listed)}")
    return [stage for stage in listed if stage.name in wanted]


def run_suite(listed: list[Stage], limit: float, work: Path, out: Path) -> list[Outcome]:
    """Run the stages; after each of them ``out`` has the archive of ``work``."""
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        (work / "summary.md").write_text(summary(outcomes, work))
        archive.write(work, out / ARCHIVE)
        print(f"{outcome.name:<12} {outcome.status:<12} {outcome.seconds:5.0f} s  {outcome.last_line}", flush=True)

    try:
        return run(listed, work, limit, report)
    except KeyboardInterrupt:
        archive.write(work, out / ARCHIVE)  # with what the stage that ran has left
        raise


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {ARCHIVE}")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds, all stages together")
    parser.add_argument("--stages", help="some of them, by commas")
    parser.add_argument("--dry-run", action="store_true", help="on the simulated GPU (BIASLOSS_SIMULATED_GPU)")
    arguments = parser.parse_args()
    if arguments.dry_run:
        if "BIASLOSS_SIMULATED_GPU" not in os.environ:
            sys.exit("bench.gpu_suite --dry-run needs BIASLOSS_SIMULATED_GPU, the path of the simulated GPU's library")
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("bench.gpu_suite needs a GPU, and torch finds none here; --dry-run takes the simulated one")
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, _stop)  # so that the stage that runs is ended, too
    out = arguments.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        listed = chosen(stages(Where(work, arguments.dry_run)), arguments.stages)
        outcomes = run_suite(listed, arguments.limit, work, out)
        print("\n" + (work / "summary.md").read_text())
    if any(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
