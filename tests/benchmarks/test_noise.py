"""What --compare says of runs with known changes, and of runs with none."""

from __future__ import annotations

import dataclasses

import pytest

from biasloss_ext.benchmarks import noise
from tests.benchmarks.made_up_runs import TIMES, run


def verdicts(before, after) -> dict[tuple[str, str], str]:  # type: ignore[no-untyped-def]
    return {(change.group, change.entry): change.verdict for change in noise.changes(before, after)}


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_20_percent_in_one_kernel_shows_and_nothing_else(seed: int) -> None:
    before = run(TIMES, seed=2 * seed)
    after = run(TIMES, seed=2 * seed + 1, planted={(2, "ours"): 1.2})
    found = verdicts(before, after)
    assert found.pop(("op 2 float32", "ours")) == "slower"
    assert set(found.values()) == {"same"}
    (change,) = [c for c in noise.changes(before, after) if (c.group, c.entry) == ("op 2 float32", "ours")]
    assert change.ratio == pytest.approx(1.2, rel=0.06)
    assert verdicts(after, before)["op 2 float32", "ours"] == "faster"


def test_two_runs_of_the_same_code_seldom_differ() -> None:
    compared = [verdicts(run(TIMES, seed=2 * seed), run(TIMES, seed=2 * seed + 1)) for seed in range(50)]
    moved = sum(verdict != "same" for found in compared for verdict in found.values())
    assert moved <= 0.01 * sum(map(len, compared))


def test_a_slower_machine_is_no_change() -> None:
    slower = {name: 1.5 * seconds for name, seconds in TIMES.items()}
    assert set(verdicts(run(TIMES), run(slower, seed=1)).values()) == {"same"}


def test_a_noisy_machine_hides_20_percent_but_not_a_doubling() -> None:
    before = run(TIMES, noise=0.15, seed=0)
    found = verdicts(before, run(TIMES, noise=0.15, seed=1, planted={(0, "ours"): 1.2, (3, "ours"): 8.0}))
    assert found["op 0 float32", "ours"] == "same"
    assert found["op 3 float32", "ours"] == "slower"


def test_controls_that_moved_raise_the_bar() -> None:
    before = run(TIMES, noise=0.001)
    jumping = {(index, "compiled"): (1.3, 0.75)[index % 2] for index in range(6)}
    jumping |= {(index, "eager"): (0.7, 1.4)[index % 2] for index in range(6)}
    after = run(TIMES, noise=0.001, seed=1, planted={**jumping, (0, "ours"): 1.2})
    changes = noise.changes(before, after)
    assert all(change.noise > 0.3 for change in changes)


def test_without_controls_the_time_itself_counts() -> None:
    found = verdicts(run({"ours": 1e-3}, noise=0.01), run({"ours": 1.4e-3}, noise=0.01, seed=1))
    assert set(found.values()) == {"slower"}


def test_contenders_and_groups_of_one_run_alone_are_left_out() -> None:
    before, after = run(TIMES, groups=3), run({**TIMES, "new": 1e-3}, groups=4, seed=1)
    found = verdicts(before, after)
    assert {group for group, _ in found} == {f"op {index} float32" for index in range(3)}
    assert "new" not in {entry for _, entry in found}


def test_a_single_visit_is_compared_without_an_interval() -> None:
    assert set(verdicts(run(TIMES, visits=1, noise=1e-3), run(TIMES, visits=1, noise=1e-3, seed=1)).values()) == {
        "same"
    }


def test_complains_of_noise_and_load() -> None:
    assert noise.complaints(run(TIMES, noise=0.005)) == []
    (noisy,) = noise.complaints(run(TIMES, noise=0.2))
    assert "too noisy" in noisy and "op 2 float32" in noisy
    (busy,) = noise.complaints(dataclasses.replace(run(TIMES, noise=0.005), load_before=1.5))
    assert "busy" in busy and "1.50" in busy


def test_disagreements_name_the_ratios_that_moved() -> None:
    before, after = run(TIMES, noise=0.005), run(TIMES, noise=0.005, seed=1, planted={(1, "ours"): 1.2})
    (said,) = noise.disagreements(before, after)
    assert said.startswith("op 1 float32: 1.")
    assert noise.disagreements(before, run(TIMES, noise=0.005, seed=3)) == []
