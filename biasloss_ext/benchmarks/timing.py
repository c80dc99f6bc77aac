"""Clocks: how long a step takes on this device, and how much memory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

SHORTEST_SAMPLE = 2e-3  # seconds; clocks and wake-ups weigh little in it
LONG_CALL = 20e-3  # seconds; a call that long needs no other one before it to refill small caches
PROFILED_CALLS = 5


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class WallClock:
    """Host time of one step: what a training loop waits for. Calls go round the input sets, sample after sample.

    Args:
        now: seconds; `time.thread_time` counts the CPU time of this thread instead, for a busy machine.
    """

    def __init__(
        self,
        call: Callable[[int], object],
        device: torch.device,
        shortest: float = SHORTEST_SAMPLE,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.call = call
        self.device = device
        self.now = now
        self.turn = 0
        self.seconds = min(self._time(1) for _ in range(3))
        self.calls = max(1, round(shortest / max(self.seconds, 1e-9)))

    def sample(self) -> float:
        """Seconds a call, over as many calls as make a sample of sufficient length."""
        if self.seconds < LONG_CALL:
            self._time(1)
        return self._time(self.calls)

    def sample_seconds(self) -> float:
        return self.seconds * (self.calls + (self.seconds < LONG_CALL))

    def _time(self, calls: int) -> float:
        synchronize(self.device)
        start = self.now()
        for _ in range(calls):
            self.call(self.turn)
            self.turn += 1
        synchronize(self.device)
        return (self.now() - start) / calls


def in_turns(
    calls: dict[str, Callable[[int], object]],
    device: torch.device,
    rounds: int,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds per call by the clock ``now``, a sample of each in every round."""
    clocks = {name: WallClock(call, device, now=now) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            samples[name].append(clock.sample() * 1e3)
    return samples


class GraphClock:
    """GPU time of one step: replays of a CUDA graph over all input sets, between events. No launch gaps of the host."""

    method = "CUDA graph"

    def __init__(self, call: Callable[[int], object], sets: int, shortest: float = SHORTEST_SAMPLE) -> None:
        self.sets = sets
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for turn in range(sets):
                call(turn)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = [call(turn) for turn in range(sets)]  # else the pool would hand their memory to the next call
        self.replays = 1
        self.replays = max(1, round(shortest / max(min(self.sample() for _ in range(3)) * sets, 1e-9)))

    def sample(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.graph.replay()
        start.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / (self.replays * self.sets)


class KernelClock:
    """GPU time of a step that no graph can hold: the sum of its kernels' durations, as the profiler sees them."""

    method = "sum of kernels"

    def __init__(self, call: Callable[[int], object]) -> None:
        self.call = call
        self.turn = 0

    def sample(self) -> float:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(PROFILED_CALLS):
                self.call(self.turn)
                self.turn += 1
            torch.cuda.synchronize()
        microseconds = sum(event.self_device_time_total for event in profile.key_averages())
        return float(microseconds) * 1e-6 / PROFILED_CALLS


def gpu_clock(call: Callable[[int], object], sets: int, capturable: bool) -> GraphClock | KernelClock:
    """A graph's clock where the step can be captured, otherwise the profiler's."""
    if capturable:
        with contextlib.suppress(RuntimeError):
            return GraphClock(call, sets)
        torch.cuda.synchronize()
    return KernelClock(call)


def peak_bytes(call: Callable[[int], object], device: torch.device) -> int:
    """Most memory that one step holds at a time beyond what it found, its results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(0)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = largest = 0
    for change in _allocations(call):
        held += change
        largest = max(largest, held)
    return largest


def _allocations(call: Callable[[int], object]) -> list[int]:
    """Bytes that PyTorch's CPU allocator hands out (positive) and takes back (negative), in order."""
    with _silent_stderr():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = call(0)
        del kept
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return [
        event["args"]["Bytes"] for event in sorted(memory, key=lambda event: (event["ts"], event["args"]["Ev Idx"]))
    ]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library reports its start and stop there, past Python."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
