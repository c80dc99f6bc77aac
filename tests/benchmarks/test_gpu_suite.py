"""The GPU suite: a dry run of every stage on the simulated GPU, its archive, and its time limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import archive, gpu_suite
from bench.gpu import arguments, kernels, op_calls, smoke
from bench.gpu_suite import ARCHIVE, Where
from bench.stages import GRACE, Outcome, Stage
from biasloss_ext.benchmarks import results
from biasloss_ext.benchmarks.ops import OPS as MEASURED
from biasloss_ext.ops.registry import OPS
from tests.benchmarks.made_up_runs import TIMES, run
from tests.cudasim import simulated_gpu

STAGES = ["library", "smoke", "gpu-tests", "training", "kernels", "memcheck", "racecheck", "nsight", "peers"]
# Of a machine that does other things besides; alone on two cores a dry run takes about a minute.
DRY_RUN_LIMIT = 500.0


def contents(path: Path) -> dict[str, str]:
    with tarfile.open(path) as file:
        return {name: file.extractfile(name).read().decode() for name in file.getnames()}  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.thorough
def test_a_dry_run_leaves_one_archive_with_the_result_of_every_stage(tmp_path: Path) -> None:
    environment = {**os.environ, "BIASLOSS_SIMULATED_GPU": str(simulated_gpu.build())}
    command = [sys.executable, "-m", "bench.gpu_suite", "--dry-run", "--out", str(tmp_path)]
    command += ["--limit", str(DRY_RUN_LIMIT)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=gpu_suite.ROOT, env=environment)
    assert time.monotonic() - start < DRY_RUN_LIMIT + 2 * GRACE
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]
    found = contents(tmp_path / ARCHIVE)
    outcomes = json.loads(found["stages.json"])
    assert [(outcome["name"], outcome["status"]) for outcome in outcomes] == [(name, "ok") for name in STAGES]
    assert {f"{name}.log" for name in STAGES} <= found.keys()
    assert {f"{name}.json" for name in STAGES if name != "gpu-tests"} <= found.keys()
    assert "| kernels | ok |" in found["summary.md"]

    checks = json.loads(found["smoke.json"])
    skipped = {name for name, check in checks.items() if check["status"] == "skipped"}
    assert skipped == {"graph"}
    of_ops = {
        f"{op.name} on {backend}" for op in OPS.values() for backend in ("cuda", "triton") if backend in op.backends
    }
    assert of_ops < checks.keys()
    assert {"info", "loss", "inference", "training step", "accelerated"} < checks.keys()
    for name in ("training", "peers"):
        assert all("wall_ms" in entry for entry in json.loads(found[f"{name}.json"]).values())
    (tmp_path / "kernels.json").write_text(found["kernels.json"])
    measured = results.load(tmp_path / "kernels.json")
    assert {group.op for group in measured.groups} == set(MEASURED) - set(kernels.LEFT_OUT)
    assert all(entry.status == "ok" for group in measured.groups for entry in group.entries if entry.role == "ours")
    assert json.loads(found["library.json"])["built"] is False


def test_limits_leave_time_for_what_is_most_valuable() -> None:
    listed = gpu_suite.stages(Where(Path("out")))
    assert [stage.name for stage in listed] == STAGES
    # The library comes ready-built; were it built, the measured stages would still begin.
    assert sum(stage.limit for stage in listed[:4]) + GRACE <= gpu_suite.LIMIT
    assert sum(stage.limit for stage in listed[1:6]) + GRACE <= gpu_suite.LIMIT <= 540


def test_a_dry_run_runs_the_same_scripts(tmp_path: Path) -> None:
    """But for the tests, which it collects, and the tools around a script."""
    for real, dry in zip(gpu_suite.stages(Where(tmp_path)), gpu_suite.stages(Where(tmp_path, dry=True)), strict=True):
        assert (real.name, real.environment) == (dry.name, dry.environment)
        assert dry.limit == gpu_suite.DRY_STRETCH * real.limit
        if real.name != "gpu-tests":
            script = list(real.command[real.command.index("-m") :]) if "-m" in real.command else []
            script[script.index("--device") + 1] = "cpu"
            script[script.index("--limit") + 1] = str(dry.limit - gpu_suite.MARGIN)
            assert [part for part in dry.command if part != "--tiny"] == [sys.executable, *script]
    assert "--clock-control none" in " ".join(gpu_suite.PROFILER)


def test_every_op_with_kernels_for_gpus_is_called() -> None:
    called = {name for name, _ in op_calls.calls(smoke.TINY_SHAPES[0], torch.float32)}
    assert called == {name for name, op in OPS.items() if set(op.backends) & {"cuda", "triton"}}


@pytest.mark.parametrize("dtype", list(smoke.UNIT_ROUNDOFF))
def test_a_wrong_output_fails_the_smoke_test(dtype: torch.dtype) -> None:
    shape = op_calls.Shape(2, 4, 3, 4, 3, 1)
    given = arguments.Arguments(torch.device("cpu"), True, 1.0, Path("unused"))
    call = next(call for name, call in op_calls.calls(shape, dtype) if name == "pointwise")
    right = OPS["pointwise"]

    class Wrong:
        reference = staticmethod(right.reference)

        def __call__(self, *values: Any, backend: str, **options: Any) -> Any:
            y, statistics = right(*values, backend="reference", **options)
            return (y + (0.2 * (y == y.max())).to(y.dtype), statistics) if backend == "wrong" else (y, statistics)

    smoke.check_op(given, Wrong(), "right", call, dtype)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="output 0: error"):
        smoke.check_op(given, Wrong(), "wrong", call, dtype)  # type: ignore[arg-type]


def test_shapes_take_turns_the_largest_first() -> None:
    listed = kernels.workloads(tiny=False)
    ops = [name for name in MEASURED if name not in kernels.LEFT_OUT]
    assert {workload.op for workload in listed[: len(ops)]} == set(ops)
    for name in ops:
        sizes = [MEASURED[name].cost(workload).bytes for workload in listed if workload.op == name]
        assert sizes == sorted(sizes, reverse=True)


def python(name: str, code: str, limit: float = 60.0) -> Stage:
    return Stage(name, (sys.executable, "-c", code), limit)


def test_the_archive_is_there_after_each_stage(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    look = f"import tarfile; print(sorted(tarfile.open({str(out / ARCHIVE)!r}).getnames()))"
    gpu_suite.run_suite([python("first", "print('done')"), python("second", look)], 120.0, work, out)
    found = contents(out / ARCHIVE)
    assert "'first.log'" in found["second.log"]
    assert "| first | ok |" in found["summary.md"]


def test_long_logs_are_cut_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "long.log").write_text("x" * archive.LARGEST_FILE + "the end")
    archive.write(tmp_path / "in", tmp_path / "out.tgz")
    (text,) = contents(tmp_path / "out.tgz").values()
    assert len(text) == archive.LARGEST_FILE
    assert text.endswith("the end")


def test_a_suite_that_is_ended_leaves_what_it_has(tmp_path: Path) -> None:
    code = f"""
import signal, sys
from pathlib import Path
from bench import gpu_suite
from bench.stages import Stage
signal.signal(signal.SIGTERM, gpu_suite._stop)
stages = [
    Stage("first", (sys.executable, "-c", "print(1)"), 60.0),
    Stage("second", (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"), 60.0),
]
work = Path({str(tmp_path / "work")!r})
gpu_suite.run_suite(stages, 120.0, work, Path({str(tmp_path / "out")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_suite.ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "work" / "second.log"
    while not (log.exists() and "begun" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    found = contents(tmp_path / "out" / ARCHIVE)
    assert "begun" in found["second.log"]
    assert json.loads(found["stages.json"])[0]["name"] == "first"


def test_summary_has_the_stages_and_what_was_measured(tmp_path: Path) -> None:
    outcomes = [Outcome("library", "ok", 61.4, "done"), Outcome("nsight", "skipped", 0.0, "ncu is not on the PATH")]
    assert "| nsight | skipped | 0 | ncu is not on the PATH |" in gpu_suite.summary(outcomes, tmp_path)
    run(TIMES).save(tmp_path / "kernels.json")
    step = {"wall_ms": [3.0, 1.0, 2.0], "graph_ms": [1.5], "kernels_ms": 1.25, "peak_bytes": 4_000_000_000}
    (tmp_path / "training.json").write_text(json.dumps({"ours": step, "other": {"problems": ["no memory"]}}))
    (tmp_path / "smoke.json").write_text(json.dumps({"loss": {"status": "failed", "reason": "error 3"}}))
    text = gpu_suite.summary(outcomes, tmp_path)
    assert "| op 0 float32 | 1" in text
    assert "Some Processor" in text
    assert "| ours | 2.00 ms | 1.25 ms | 1.50 ms | 4 GB |" in text
    assert "| other |  |  |  |  | no memory |" in text
    assert "failed: loss: error 3" in text


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    environment = {name: value for name, value in os.environ.items() if name != "BIASLOSS_SIMULATED_GPU"}
    for options, sentence in (
        ([], "bench.gpu_suite needs a GPU, and torch finds none here; --dry-run takes the simulated one\n"),
        (
            ["--dry-run"],
            "bench.gpu_suite --dry-run needs BIASLOSS_SIMULATED_GPU, the path of the simulated GPU's library\n",
        ),
    ):
        command = [sys.executable, "-m", "bench.gpu_suite", "--out", str(tmp_path), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=gpu_suite.ROOT, env=environment)
        assert done.returncode == 1
        assert done.stderr == sentence
