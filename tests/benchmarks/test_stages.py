"""Commands in stages: limits, what survives, what is skipped."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench import stages
from bench.stages import Stage


def python(name: str, code: str, limit: float = 20.0, **options: str) -> Stage:
    return Stage(name, (sys.executable, "-c", code), limit, **options)  # type: ignore[arg-type]


def test_a_stage_that_fails_or_takes_too_long_stops_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    start = time.monotonic()
    outcomes = stages.run(
        [
            python("good", "print('first'); print('last')"),
            python("bad", "print('why'); raise SystemExit(3)"),
            python("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=2.0),
            python("without", "", needs="no-such-program"),
            Stage("nowhere", (str(tmp_path / "nothing"),), 5.0),
            python("after", "import os; print(os.environ['GIVEN'])", environment={"GIVEN": "yes"}),  # type: ignore[arg-type]
        ],
        tmp_path,
        120.0,
        lambda outcome: told.append(outcome.name),
    )
    assert time.monotonic() - start < 50
    found = {outcome.name: (outcome.status, outcome.last_line) for outcome in outcomes}
    assert found["good"] == ("ok", "last")
    assert found["bad"] == ("failed", "why")
    assert found["slow"][0] == "out of time"
    assert "begun" in (tmp_path / "slow.log").read_text()
    assert found["without"] == ("skipped", "no-such-program is not on the PATH")
    assert found["nowhere"][0] == "failed"
    assert found["after"] == ("ok", "yes")
    assert told == list(found)
    assert [entry["name"] for entry in json.loads((tmp_path / stages.FILE_NAME).read_text())] == told


def test_children_of_a_stage_end_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {child}"
    start = time.monotonic()
    (outcome,) = stages.run([python("stubborn", code, limit=1.0)], tmp_path, 60.0, lambda outcome: None)
    assert outcome.status == "out of time"
    assert time.monotonic() - start < 30


def test_the_whole_has_a_limit(tmp_path: Path) -> None:
    outcomes = stages.run([python("late", "print()")], tmp_path, stages.GRACE, lambda outcome: None)
    assert (outcomes[0].status, outcomes[0].last_line) == ("skipped", "no time left")
