"""Sequences of launches, recorded once and replayed without the Python that led to them.

A fused block is thirteen launches; what decides on them, one op after the other, costs the host more than they do, and gives
the same answer in every step. `replayed` runs a function the first time with a `Recorder`, which notes allocations, launches
and the calls of compiled ops, and from then on allocates the same buffers and launches the same kernels on the new tensors.

Nothing else that the function does may matter: a tensor in a launch or in the results that is neither an input nor allocated by
`empty`, such as a copy in another dtype, ends the recording, and the function is called as before. It is also called under
capture, under a profiler's launch hooks, and for inputs whose address is not a multiple of 16.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from biasloss_ext.ops.triton_launch import Launch
    from biasloss_ext.ops.triton_replay import Recording

MOST_RECORDINGS = 1024  # of one function; a program with more shapes than that starts over
TICKETS = 0  # their place in the table of a replay; the inputs follow, then the buffers, then the scratch memory

Tensors = tuple[Tensor | None, ...]


class Place(NamedTuple):
    """A tensor of a step: ``offset`` bytes into an entry of the table."""

    entry: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor, entry: int, base: int) -> Place:
        return Place(entry, tensor.data_ptr() - base, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def within(self, memory: Tensor) -> Tensor:
        """The tensor, where ``memory`` is the entry."""
        layout = (self.dtype, self.shape, self.strides)
        if self.offset == 0 and layout == (memory.dtype, memory.shape, memory.stride()):
            return memory
        if self.dtype is memory.dtype:
            first = memory.storage_offset() + self.offset // memory.element_size()
            return memory.as_strided(self.shape, self.strides, first)
        start = memory.storage_offset() * memory.element_size() + self.offset
        bare = torch.empty(0, dtype=self.dtype, device=memory.device)
        return bare.set_(memory.untyped_storage(), start // self.dtype.itemsize, self.shape, self.strides)  # type: ignore[call-overload]


class Nothing(NamedTuple):
    """A tensor without elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def like(tensor: Tensor) -> Nothing:
        return Nothing(tuple(tensor.shape), tensor.dtype)


class Unknown(Exception):
    """A tensor that is neither an input nor a buffer."""


class Launched(NamedTuple):
    launch: Launch
    places: tuple[Place | Nothing | None, ...]


class Called(NamedTuple):
    """A call of an op from the compiled library, which allocates its results itself."""

    op: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[int | None, ...]  # entries; None for a result without elements


class Recorder:
    """Notes what a function does with its inputs, while it is the ``recorder`` of the thread."""

    def __init__(self, inputs: Tensors) -> None:
        self.inputs = inputs
        self.steps: list[Launched | Called] = []
        self.allocated: dict[int, Tensor] = {}  # by entry; they stay alive so that no address is taken twice
        self.tickets = 0
        self.failed = False
        self._entries = itertools.count(1 + len(inputs))
        self._ranges: list[tuple[int, int, int]] = []
        for entry, tensor in enumerate(inputs, 1):
            if tensor is not None:
                self._enter(tensor, entry)

    def _enter(self, tensor: Tensor, entry: int) -> None:
        start = tensor.data_ptr()
        if tensor.numel() == 0:
            return
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + (last + 1) * tensor.element_size()
        # Where inputs share memory, an address says nothing about which of them is meant.
        self.failed |= any(start < other_end and other < end for other, other_end, _ in self._ranges)
        self._ranges.append((start, end, entry))

    def buffer(self, tensor: Tensor) -> int:
        entry = next(self._entries)
        self.allocated[entry] = tensor
        self._enter(tensor, entry)
        return entry

    def tickets_for(self, counters: Tensor, count: int) -> None:
        self.tickets = max(self.tickets, count)
        if not any(start == counters.data_ptr() for start, _, _ in self._ranges):
            self._enter(counters, TICKETS)

    def place(self, tensor: Tensor) -> Place:
        address = tensor.data_ptr()
        for start, end, entry in self._ranges:
            if start <= address < end:
                return Place.of(tensor, entry, start)
        raise Unknown

    def place_of(self, tensor: Tensor | None) -> Place | Nothing | None:
        if tensor is None:
            return None
        return Nothing.like(tensor) if tensor.numel() == 0 else self.place(tensor)

    def launched(self, launch: Launch, tensors: Tensors) -> None:
        try:
            self.steps.append(Launched(launch, tuple(map(self.place_of, tensors))))
        except Unknown:
            self.failed = True

    def called(self, op: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], results: Any) -> None:
        def placed(value: Any) -> Any:
            return self.place(value) if isinstance(value, Tensor) and value.numel() > 0 else value

        try:
            placed_arguments = tuple(map(placed, arguments))
            placed_options = {name: placed(value) for name, value in options.items()}
        except Unknown:
            self.failed = True
            return
        entries = tuple(self.buffer(t) if t.numel() > 0 else None for t in results)
        self.steps.append(Called(op, placed_arguments, placed_options, entries))

    def recording(self, results: Tensors) -> Recording | None:
        """Return the recording that leads to the results; None where something is unknown."""
        from biasloss_ext.ops.triton_replay import Recording

        if self.failed:
            return None
        try:
            return Recording(self, tuple(map(self.place_of, results)))
        except Unknown:
            return None


class _Recording(threading.local):
    recorder: Recorder | None = None  # of this thread's calls


recording = _Recording()


def empty(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, known to a recording."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if recording.recorder is not None:
        recording.recorder.buffer(made)
    return made


def empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty_strided`, known to a recording."""
    made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if recording.recorder is not None:
        recording.recorder.buffer(made)
    return made


def is_ready(x: Tensor) -> bool:
    """Whether launches go to the device of x, and nothing captures them."""
    return not x.is_cuda or (
        x.get_device() == torch._C._cuda_getDevice() and not torch.cuda.is_current_stream_capturing()
    )


Recordings = dict[Hashable, "Recording | None"]


def replayed(recordings: Recordings, key: Hashable, inputs: Tensors, run: Callable[[], Tensors]) -> Tensors:
    """Return the results of ``run()``, from a recording of an earlier call with the same key where there is one.

    Args:
        recordings: of the function; they are entered here.
        key: everything that decides on what ``run`` does, but the values and addresses of the inputs: their shapes, strides
            and dtypes, which of them are given, their device, and all options.
        inputs: every tensor that ``run`` reads or writes; the first is given, and on the device that is to run it.
        run: calls ops on the inputs. Its results are inputs, what ops returned, or views of these.
    """
    if recording.recorder is not None:
        return run()
    found = recordings.get(key)
    if found is not None:
        results = found.replay(inputs)
        return run() if results is None else results
    first = inputs[0]
    if key in recordings or first is None or not is_ready(first):
        return run()
    return _recorded(recordings, key, inputs, run)


def _recorded(recordings: Recordings, key: Hashable, inputs: Tensors, run: Callable[[], Tensors]) -> Tensors:
    recorder = Recorder(inputs)
    outer, recording.recorder = recording.recorder, recorder
    try:
        results = run()
    finally:
        recording.recorder = outer
    if len(recordings) >= MOST_RECORDINGS:
        recordings.clear()
    recordings[key] = recorder.recording(results)
    return results
