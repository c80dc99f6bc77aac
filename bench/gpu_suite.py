"""``python -m bench.gpu_suite --out DIR``: everything that needs a GPU, in under nine minutes.

Builds for the GPU that is there, runs tests/gpu and the other tests, compute-sanitizer on small shapes, Nsight Compute
where it is available, and the benchmarks. Logs, ``stages.json`` and ``summary.md`` are written as they come: a suite that
is broken off leaves what it finished.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from bench.stages import Outcome, Stage, run
from biasloss_ext.benchmarks import noise, results, table
from biasloss_ext.benchmarks.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ",".join(name for name in OPS if name != "skipblocknet")
BENCHMARKS = (("kernels", KERNELS, 75), ("network", "skipblocknet", 75))
LIMIT = 530.0  # seconds, all stages together
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


def stages(out: Path, architecture: str, jobs: int) -> list[Stage]:
    """All of them, for a GPU of ``architecture``, as "9.0"."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    small = (python, "-m", "bench.small_kernels")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a cached block would hide what is read beside a tensor
    profiler = ("ncu", "--csv", "--metrics", ",".join(METRICS), "--kernel-name-base", "demangled")
    measure = (python, "-m", "biasloss_ext", "bench", "--quick", "--device", "cuda")
    return [
        Stage(
            "build",
            (python, "setup.py", "build_ext", "--inplace"),
            110,
            {"TORCH_CUDA_ARCH_LIST": architecture, "BIASLOSS_CUDA": "1"},
            needs="nvcc",
        ),
        Stage("info", (python, "-c", "from biasloss_ext.info import report; print(report())"), 20),
        Stage("gpu-tests", (*pytest, "-v", "tests/gpu"), 85),
        Stage("tests", (*pytest, "-n", str(jobs), "-m", "not slow", "--ignore=tests/gpu", "tests"), 60),
        Stage("memcheck", (*sanitizer, "memcheck", *small), 35, no_cache, needs="compute-sanitizer"),
        Stage("racecheck", (*sanitizer, "racecheck", *small), 35, no_cache, needs="compute-sanitizer"),
        Stage("nsight", (*profiler, *small, "--large"), 30, needs="ncu"),
        *(
            Stage(name, (*measure, "--ops", ops, "--limit", str(limit - 15), "--out", str(out / name)), limit)
            for name, ops, limit in BENCHMARKS
        ),
    ]


def summary(outcomes: list[Outcome], out: Path) -> str:
    """A short table of the stages, and that of the benchmarks where they got that far."""
    shown = table.Table(
        "stages",
        ("stage", "status", "seconds", "last line"),
        [(o.name, o.status, f"{o.seconds:.0f}", o.last_line) for o in outcomes],
    )
    parts = [shown.markdown()]
    for name, _, _ in BENCHMARKS:
        measured = out / name / results.FILE_NAME
        if measured.exists():
            parts += benchmark_summary(results.load(measured))
    return "\n\n".join(parts) + "\n"


def benchmark_summary(found: results.Results) -> list[str]:
    parts = [f"{found.device['name']}, {found.date}"]
    clocks = ("wall", "gpu") if found.device["type"] == "cuda" else ("wall",)
    parts += [f"{clock}:\n\n{table.summary(found, clock).markdown()}" for clock in clocks]
    if table.missing(found).rows:
        parts.append("Not measured:\n\n" + table.missing(found).markdown())
    return parts + noise.complaints(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, results and plots")
    parser.add_argument("--stages", help="some of them, by commas")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_suite needs a GPU, and torch finds none here")
    out = arguments.out.resolve()
    major, minor = torch.cuda.get_device_capability()
    listed = stages(out, f"{major}.{minor}", max(1, min(8, (os.cpu_count() or 2) // 2)))
    if arguments.stages is not None:
        wanted = arguments.stages.split(",")
        unknown = set(wanted) - {stage.name for stage in listed}
        if unknown:
            sys.exit(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in listed)}")
        listed = [stage for stage in listed if stage.name in wanted]
    os.chdir(ROOT)

    def tell(outcome: Outcome) -> None:
        print(f"{outcome.name:<12} {outcome.status:<12} {outcome.seconds:5.0f} s  {outcome.last_line}", flush=True)

    outcomes = run(listed, out, LIMIT, tell)
    text = summary(outcomes, out)
    (out / "summary.md").write_text(text)
    print("\n" + text)
    if any(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
