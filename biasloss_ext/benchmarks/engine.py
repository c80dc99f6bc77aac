"""The order of events: build, check against float64, warm up, then take turns."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from biasloss_ext.benchmarks import machine
from biasloss_ext.benchmarks.contender import Contender, Inputs, Op, Step, Unavailable, Workload, dtype_name
from biasloss_ext.benchmarks.ops import OPS
from biasloss_ext.benchmarks.results import Entry, Group, Results
from biasloss_ext.benchmarks.timing import GraphClock, KernelClock, WallClock, gpu_clock, peak_bytes

T = TypeVar("T")

WARM_UP_CALLS = 3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
GPU_SAMPLES = 7
REST = 5e-3  # seconds in which the threads of another library stop to spin


@dataclass(frozen=True)
class Plan:
    """How much time to take.

    Attributes:
        visits: how often every group is measured, from beginning to end of the run, each time with new inputs: what
            drifts between two runs drifts between visits too, and so is seen.
        seconds: of timing, a visit of a group.
        most_rounds: turns that each contender gets at most, a visit.
        shortest_sample: seconds.
        limit: seconds that the whole run may take, about: when two thirds of it are over nothing more is built, and when
            all of it is over no more is measured.
    """

    visits: int = 3
    seconds: float = 2.0
    most_rounds: int = MOST_ROUNDS
    shortest_sample: float = 2e-3
    limit: float = math.inf


BUILDING = 2 / 3  # of the limit; what is left is enough to measure what is built

FULL = Plan()
QUICK = Plan(visits=3, seconds=0.4, limit=170.0)
TINY = Plan(visits=2, seconds=0.0, shortest_sample=0.0)


@dataclass
class _Competitor:
    contender: Contender
    step: Step
    entry: Entry
    inputs: list[Inputs] = field(default_factory=list)

    def call(self, turn: int) -> Sequence[Tensor]:
        return self.step(self.inputs[turn % len(self.inputs)])


@dataclass
class _Race:
    op: Op
    workload: Workload
    group: Group
    competitors: list[_Competitor]


def run(
    workloads: Sequence[Workload],
    device: torch.device,
    plan: Plan,
    *,
    quick: bool = False,
    tiny: bool = False,
    report: Callable[[str], None] = lambda text: None,
    save: Callable[[Results], None] = lambda results: None,
    operations: dict[str, Op] | None = None,
) -> Results:
    """Measure ``workloads`` on ``device``.

    Args:
        report: called with what begins, at most `steps` times.
        save: called with what is there after every group, so that it survives an interruption.
        operations: the ops by name; those of this package by default.

    Returns:
        What was found. A contender that cannot run, fails or computes something else has its reason in its entry.
    """
    operations = OPS if operations is None else operations
    start = time.perf_counter()
    load = machine.load()
    report("ceilings of the machine")
    results = Results(
        date=machine.now(),
        quick=quick,
        device=machine.describe(device),
        versions=machine.versions(),
        ceilings=machine.ceilings(device, tiny=tiny),
        load_before=load,
    )

    def elapsed() -> float:
        return time.perf_counter() - start

    def visit(race: _Race, number: int) -> None:
        report(f"{race.workload.name}: visit {number + 1} of {plan.visits}")
        _measure(race, device, plan, first=number == 0)
        results.seconds = elapsed()
        save(results)

    races = []
    for workload in workloads:
        if elapsed() > plan.limit * BUILDING:
            break
        report(f"{workload.name}: build and check")
        race = _prepare(operations[workload.op], workload, device, quick, lambda: elapsed() < plan.limit * BUILDING)
        results.groups.append(race.group)
        races.append(race)
        visit(race, 0)  # at once: a compiler may take all the time that is left
    for number, race in itertools.product(range(1, plan.visits), races):
        if elapsed() > plan.limit:
            break
        visit(race, number)
    results.seconds = elapsed()
    return results


def measure(op: Op, workload: Workload, device: torch.device, plan: Plan) -> Group:
    """Build, check and time the contenders of one workload. See `run`, which has many workloads and the machine's ceilings."""
    race = _prepare(op, workload, device, False, lambda: True)
    for number in range(plan.visits):
        _measure(race, device, plan, first=number == 0)
    return race.group


def steps(workloads: Sequence[Workload], plan: Plan) -> int:
    """How often `run` reports."""
    return 1 + len(workloads) * (1 + plan.visits)


def prepare(op: Op, contender: Contender, workload: Workload, device: torch.device) -> tuple[Step, float]:
    """A contender's step and its relative error against float64 on random inputs.

    Raises:
        Unavailable: it cannot run here, or computes something else; the message has the reason.
    """
    step, exact = contender.build(workload, device)
    for _ in range(op.draws):
        inputs = inputs_of(contender, workload, op.make_inputs(workload, device))
        expected = [tensor.detach().double() for tensor in exact(inputs)]  # first: the step may overwrite its inputs
        error = _relative_error(step(inputs), expected)
        if error <= op.tolerance[workload.dtype]:  # NaN is not
            return step, error
    raise Unavailable(f"wrong result: relative error {error:.2g} against float64")


def _prepare(op: Op, workload: Workload, device: torch.device, quick: bool, time_is_left: Callable[[], bool]) -> _Race:
    least = op.cost(workload)
    group = Group(
        name=workload.name,
        op=op.name,
        shape=workload.shape_name,
        batch=workload.batch,
        classes=workload.classes,
        dtype=dtype_name(workload.dtype),
        layout=workload.layout,
        backward=workload.backward,
        one_set=workload.one_set,
        axis=workload.axis,
        sets=0,
        bytes=least.bytes,
        flops=least.flops,
        ceiling=least.ceiling,
    )
    competitors: list[_Competitor] = []
    for contender in op.contenders:
        if not contender.takes_part(workload):
            continue
        entry = Entry(contender.name, contender.role)
        group.entries.append(entry)
        try:
            if quick and device.type in contender.slow_on:
                raise Unavailable("slow to build: not part of a quick run")
            if competitors and not time_is_left():
                raise Unavailable("no time was left to build it")
            step, entry.error = prepare(op, contender, workload, device)
            competitors.append(_Competitor(contender, step, entry))
        except Unavailable as reason:
            entry.status = "wrong" if str(reason).startswith("wrong result") else "unavailable"
            entry.reason = str(reason)
        except Exception as error:  # whatever a contender does wrong must not stop the others
            _fail(entry, error)
    return _Race(op, workload, group, competitors)


def _measure(race: _Race, device: torch.device, plan: Plan, first: bool) -> None:
    """One visit: new inputs, warm-up, turns in an order that changes from round to round."""
    op, workload = race.op, race.workload
    one = op.make_inputs(workload, device)
    held = sum(tensor.numel() * tensor.element_size() for tensor in one)
    race.group.sets = 1 if workload.one_set else machine.input_sets(held, device)
    sets = [one] + [op.make_inputs(workload, device) for _ in range(race.group.sets - 1)]
    copies = (
        [_copied(inputs, own_layout=True) for inputs in sets]
        if any(_own_layout(c.contender, workload) for c in race.competitors)
        else []
    )
    for competitor in race.competitors:
        contender = competitor.contender
        shares = _own_layout(contender, workload) and not contender.overwrites_inputs
        competitor.inputs = copies if shares else [inputs_of(contender, workload, inputs) for inputs in sets]
    _measure_wall(race.competitors, device, plan)
    if device.type == "cuda":
        _measure_gpu(race.competitors, race.group.sets)
    if first:
        for competitor in race.competitors:
            if not competitor.contender.own_threads:  # whose memory is not PyTorch's either
                competitor.entry.peak_bytes = _attempt(competitor, peak_bytes, competitor.call, device)
    for competitor in race.competitors:
        competitor.inputs = []


def _measure_wall(competitors: list[_Competitor], device: torch.device, plan: Plan) -> None:
    def start(competitor: _Competitor) -> WallClock:
        for turn in range(WARM_UP_CALLS):
            competitor.call(turn)
        return WallClock(competitor.call, device, plan.shortest_sample)

    clocks = [
        (competitor, clock)
        for competitor in competitors
        if (clock := _attempt(competitor, start, competitor)) is not None
    ]
    round_seconds = sum(clock.sample_seconds() for _, clock in clocks)
    rounds = max(FEWEST_ROUNDS, min(int(plan.seconds / max(round_seconds, 1e-9)), plan.most_rounds))
    samples: dict[str, list[float]] = {competitor.contender.name: [] for competitor, _ in clocks}
    for _ in range(rounds):
        for competitor, clock in random.sample(clocks, len(clocks)):
            seconds = _attempt(competitor, clock.sample)
            if seconds is not None:
                samples[competitor.contender.name].append(seconds)
            if competitor.contender.own_threads:
                time.sleep(REST)
    for competitor, _ in clocks:
        if competitor.entry.status == "ok":
            competitor.entry.wall.append(samples[competitor.contender.name])


def _measure_gpu(competitors: list[_Competitor], sets: int) -> None:
    def start(competitor: _Competitor) -> GraphClock | KernelClock:
        clock = gpu_clock(competitor.call, sets, competitor.contender.capturable)
        competitor.entry.gpu_method = clock.method
        return clock

    for competitor in competitors:  # one at a time: a graph holds the memory of a call for every input set
        clock = _attempt(competitor, start, competitor)
        if clock is None:
            continue
        seconds = _attempt(competitor, _samples, clock)
        if seconds is not None:
            competitor.entry.gpu.append(seconds)
        del clock


def _samples(clock: GraphClock | KernelClock) -> list[float]:
    return [clock.sample() for _ in range(GPU_SAMPLES)]


def _attempt(competitor: _Competitor, work: Callable[..., T], *arguments: Any) -> T | None:
    """What ``work`` returns; None where it fails, with the reason in the entry, or where it failed before."""
    if competitor.entry.status != "ok":
        return None
    try:
        return work(*arguments)
    except Exception as error:  # whatever a contender does wrong must not stop the others
        _fail(competitor.entry, error)
        return None


def _relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of the first tensor (a loss, scores), and of all others together (gradients): the larger one."""
    if len(found) != len(expected):
        return float("inf")
    errors = []
    for part in (slice(0, 1), slice(1, None)):
        pairs = list(zip(found[part], expected[part], strict=True))
        if pairs:
            difference = sum(float((a.detach().double() - b).square().sum()) for a, b in pairs)
            size = sum(float(b.square().sum()) for _, b in pairs)
            errors.append((difference / size) ** 0.5 if size > 0 else difference**0.5)
    return float(torch.tensor(errors).max())  # NaN wins, as it does not with max()


def inputs_of(contender: Contender, workload: Workload, inputs: Inputs) -> Inputs:
    """``inputs`` themselves, or copies where the contender overwrites them or takes images in its own layout."""
    own_layout = _own_layout(contender, workload)
    return _copied(inputs, own_layout) if own_layout or contender.overwrites_inputs else inputs


def _own_layout(contender: Contender, workload: Workload) -> bool:
    return workload.channels_last is None and contender.channels_last


def _copied(inputs: Inputs, own_layout: bool) -> Inputs:
    def copied(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if own_layout and tensor.dim() == 4 else torch.preserve_format
        return tensor.detach().clone(memory_format=layout).requires_grad_(tensor.requires_grad)

    return tuple(copied(tensor) for tensor in inputs)


def _fail(entry: Entry, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    entry.status = "failed"
    entry.reason = f"{type(error).__name__}: {lines[0]}"[:200]
    entry.wall, entry.gpu = [], []
