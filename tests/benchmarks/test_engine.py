"""The order of events, with contenders that misbehave in every way."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch
from torch import Tensor

from biasloss_ext.benchmarks import engine
from biasloss_ext.benchmarks.contender import Built, Contender, Op, Unavailable, Workload
from biasloss_ext.benchmarks.results import Group, Results
from tests.benchmarks.made_up_runs import WORKLOAD, doubles, op

CPU = torch.device("cpu")


def run(operation: Op, workload: Workload = WORKLOAD, **options) -> Results:  # type: ignore[no-untyped-def]
    plan = options.pop("plan", engine.TINY)
    return engine.run([workload], CPU, plan, tiny=True, operations={"double": operation}, **options)


def entries(operation: Op, **options) -> dict[str, tuple[str, str]]:  # type: ignore[no-untyped-def]
    (group,) = run(operation, **options).groups
    assert all(bool(entry.wall) == (entry.status == "ok") for entry in group.entries)
    return {entry.name: (entry.status, entry.reason) for entry in group.entries}


def test_who_fails_is_shown_with_the_reason_and_stops_nobody() -> None:
    def not_installed(workload: Workload, device: torch.device) -> Built:
        raise Unavailable("no such package")

    def broken(workload: Workload, device: torch.device) -> Built:
        raise RuntimeError("first line\nsecond line")

    calls = 0

    def fails_later(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise MemoryError("no memory left")
        return x + x

    found = entries(
        op(
            doubles("ours", lambda x: x + x, "ours"),
            Contender("missing", "peer", not_installed),
            Contender("broken", "peer", broken),
            doubles("wrong", lambda x: 3 * x),
            doubles("not a number", lambda x: x * torch.nan),
            doubles("too much", lambda x: torch.cat((x, x))),
            doubles("fails later", fails_later),
            doubles("good", lambda x: 2 * x),
        )
    )
    assert found["ours"] == found["good"] == ("ok", "")
    assert found["missing"] == ("unavailable", "no such package")
    assert found["broken"] == ("failed", "RuntimeError: first line")
    assert found["wrong"] == ("wrong", "wrong result: relative error 0.5 against float64")
    assert found["not a number"][0] == "wrong"
    assert found["too much"][0] == "failed"
    assert found["fails later"] == ("failed", "MemoryError: no memory left")


@pytest.mark.parametrize("wrong_draws", [1, 2, 3])
def test_what_one_draw_spoils_another_may_show_to_be_right(wrong_draws: int) -> None:
    calls = itertools.count(1)
    found = entries(op(doubles("ours", lambda x: (3 if next(calls) <= wrong_draws else 2) * x))._replace(draws=3))
    assert found["ours"][0] == ("ok" if wrong_draws < 3 else "wrong")


def test_gradients_are_checked_even_where_the_loss_is_right() -> None:
    built = Built(
        lambda inputs: (inputs[0].sum(), inputs[0] * 1.01),
        lambda inputs: (inputs[0].double().sum(), inputs[0].double()),
    )
    found = entries(op(Contender("ours", "ours", lambda workload, device: built)))
    assert found["ours"][0] == "wrong"


def test_inputs_are_fresh_and_change_from_call_to_call() -> None:
    seen: list[int] = []
    values: set[float] = set()

    def step(x: Tensor) -> Tensor:
        seen.append(x.data_ptr())
        values.add(x[0, 0].item())
        return x + x

    (group,) = run(op(doubles("ours", step, "ours"))).groups
    assert group.sets >= 2
    assert all(first != second for first, second in itertools.pairwise(seen[1:]))
    assert len(values) > 10
    seen.clear()
    values.clear()
    (group,) = run(op(doubles("ours", step, "ours")), dataclasses.replace(WORKLOAD, one_set=True)).groups
    assert group.sets == 1
    assert len(values) == 1 + engine.TINY.visits


def test_who_overwrites_inputs_spoils_nobody_s() -> None:
    found = entries(
        op(doubles("overwrites", lambda x: x.mul_(2), overwrites_inputs=True), doubles("ours", lambda x: x + x, "ours"))
    )
    assert {status for status, _ in found.values()} == {"ok"}


@pytest.mark.parametrize("workload_s", [None, False])
def test_layout_is_the_contender_s_only_where_the_workload_leaves_it_open(workload_s: bool | None) -> None:
    seen: dict[str, set[bool]] = {"first": set(), "last": set()}

    def contender(name: str, channels_last: bool) -> Contender:
        def step(x: Tensor) -> Tensor:
            seen[name].add(x.is_contiguous(memory_format=torch.channels_last))
            return x + x

        return doubles(name, step, channels_last=channels_last)

    workload = dataclasses.replace(WORKLOAD, sample=(4, 3, 3), channels_last=workload_s)
    found = run(op(contender("first", False), contender("last", True)), workload)
    assert all(entry.timed for entry in found.groups[0].entries)
    assert seen == {"first": {False}, "last": {workload_s is None}}


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def contender(name: str) -> Contender:
        def step(x: Tensor) -> Tensor:
            order.append(name)
            return x + x

        return doubles(name, step)

    plan = dataclasses.replace(engine.TINY, seconds=0.05, most_rounds=20)
    run(op(contender("a"), contender("b")), plan=plan)
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes > 20  # one after the other would be a handful a visit


def test_what_is_there_is_saved_after_every_group_and_the_limit_ends_the_run() -> None:
    operation = op(doubles("ours", lambda x: x + x, "ours"))
    saved: list[int] = []

    def save(results: Results) -> None:
        saved.append(sum(len(entry.wall) for group in results.groups for entry in group.entries))

    run(operation, save=save)
    assert saved == [1, 2]
    saved.clear()
    found = run(operation, save=save, plan=dataclasses.replace(engine.TINY, limit=0.0))
    assert found.groups == []
    assert saved == []


def test_who_has_no_time_left_to_be_built_is_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-3
        return now

    monkeypatch.setattr(time, "perf_counter", clock)

    def slow(workload: Workload, device: torch.device) -> Built:
        nonlocal now
        now += 100.0
        return Built(lambda inputs: (inputs[0] + inputs[0],), lambda inputs: (2 * inputs[0].double(),))

    operation = op(
        doubles("ours", lambda x: x + x, "ours"), Contender("slow", "peer", slow), doubles("late", lambda x: x + x)
    )
    found = entries(operation, plan=dataclasses.replace(engine.TINY, limit=150.0))
    assert found["ours"] == found["slow"] == ("ok", "")
    assert found["late"] == ("unavailable", "no time was left to build it")


def test_reports_as_often_as_it_says() -> None:
    said: list[str] = []
    run(op(doubles("ours", lambda x: x + x, "ours")), report=said.append)
    assert len(said) == engine.steps([WORKLOAD], engine.TINY)


def test_peak_memory_counts_what_a_step_holds_at_a_time() -> None:
    def step(x: Tensor) -> Tensor:
        for _ in range(3):
            torch.empty(2**18, dtype=torch.uint8)  # freed before the next
        return x + x

    group: Group = run(op(doubles("ours", step, "ours"))).groups[0]
    assert group.ours is not None
    assert group.ours.peak_bytes is not None
    assert 2**18 <= group.ours.peak_bytes < 2**19
