"""Commands one after another, each with its own time limit; what was finished survives the rest."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE_NAME = "stages.json"
GRACE = 5.0  # seconds between the request to stop, on which pytest still prints its summary, and the end


@dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
        name: of the log file too.
        command: program and arguments.
        limit: seconds.
        environment: variables besides those that are there.
        needs: a program without which the stage is skipped.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


@dataclass
class Outcome:
    """What became of a stage: "ok", "failed", "out of time" or "skipped"; ``last_line`` of what it printed, or why."""

    name: str
    status: str
    seconds: float
    last_line: str


def run(stages: Sequence[Stage], out: Path, limit: float, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run ``stages`` in ``limit`` seconds together, each printing into ``out/<name>.log``.

    After each stage ``out/stages.json`` has the outcomes so far.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    outcomes: list[Outcome] = []
    for stage in stages:
        outcomes.append(_run(stage, out / f"{stage.name}.log", min(stage.limit, end - time.monotonic() - GRACE)))
        text = json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1)
        partial = out / (FILE_NAME + ".partial")
        partial.write_text(text + "\n")
        os.replace(partial, out / FILE_NAME)
        report(outcomes[-1])
    return outcomes


def _run(stage: Stage, log: Path, limit: float) -> Outcome:
    if stage.needs is not None and shutil.which(stage.needs) is None:
        return Outcome(stage.name, "skipped", 0.0, f"{stage.needs} is not on the PATH")
    if limit <= 0:
        return Outcome(stage.name, "skipped", 0.0, "no time left")
    start = time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                stage.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **stage.environment},
                start_new_session=True,  # so that its children can be ended with it
            )
        except OSError as error:
            return Outcome(stage.name, "failed", 0.0, str(error))
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            _end(process)
            status = "out of time"
        except KeyboardInterrupt:
            _end(process)
            raise
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(stage.name, status, time.monotonic() - start, lines[-1][:200] if lines else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
