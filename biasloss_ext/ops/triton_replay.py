"""A recorded sequence of launches, replayed on other tensors; see :mod:`biasloss_ext.ops.replay`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import triton_launch
from biasloss_ext.ops.replay import TICKETS, Called, Launched, Nothing, Place, Recorder, Tensors, is_ready

SCRATCH_ALIGNMENT = 256  # bytes


class Buffer(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Recording:
    """The steps of a function, and how its results follow from inputs and buffers."""

    def __init__(self, recorder: Recorder, results: tuple[Place | Nothing | None, ...]) -> None:
        self.results = results
        self.tickets = recorder.tickets
        of_compiled = {entry for step in recorder.steps if isinstance(step, Called) for entry in step.results}
        self.entries = 1 + recorder.inputs + len(recorder.allocated)  # the scratch memory comes after them
        kept = {place.entry for place in results if isinstance(place, Place)} | _entries_of_calls(recorder.steps)
        self.buffers: list[tuple[int, Buffer]] = []
        self.scratch = 0
        moved: dict[int, int] = {}
        for entry, tensor in recorder.allocated.items():
            if entry in of_compiled or tensor.numel() == 0:
                continue
            if entry in kept:
                self.buffers.append((entry, Buffer(tuple(tensor.shape), tensor.stride(), tensor.dtype)))
            else:
                moved[entry] = self.scratch
                self.scratch += -(-tensor.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        self.steps = [_moved(step, moved, self.entries) for step in recorder.steps]

    def replay(self, inputs: Tensors) -> Tensors | None:
        """The results for other inputs of the same shapes, strides and dtypes; None where the recording cannot serve."""
        memory = self.memory(inputs)
        if memory is None:
            return None
        table, pointers = memory
        stream: int | None = None
        for step in self.steps:
            if isinstance(step, Called):
                _call(step, table, pointers)
            elif step.launch.compiled is None:  # Triton's interpreter takes tensors
                step.launch(*[tensor_at(place, table) for place in step.places])
            else:
                stream = triton_launch.current_stream() if stream is None else stream
                step.launch.run(stream, [pointer_at(place, pointers) for place in step.places])
        return tuple([tensor_at(place, table) for place in self.results])

    def memory(self, inputs: Tensors) -> tuple[list[Tensor | None], list[int]] | None:
        """The table of tensors that the places point into, and their addresses; None where the recording cannot serve."""
        pointers, bits = [0], 0
        for tensor in inputs:
            pointer = 0 if tensor is None else tensor.data_ptr()
            bits |= pointer
            pointers.append(pointer)
        first = inputs[0]
        assert first is not None
        if bits % triton_launch.ALIGNMENT or triton_launch.is_watched() or not is_ready(first):
            return None
        table: list[Tensor | None] = [None, *inputs]
        padding = self.entries + 1 - len(table)
        table += [None] * padding
        pointers += [0] * padding
        if self.tickets:
            counters = triton_launch.tickets(first, self.tickets)
            table[TICKETS], pointers[TICKETS] = counters, counters.data_ptr()
        if self.scratch:
            memory = first.new_empty(self.scratch, dtype=torch.uint8)
            table[-1], pointers[-1] = memory, memory.data_ptr()
        for entry, (shape, strides, dtype) in self.buffers:
            tensor = first.new_empty_strided(shape, strides, dtype=dtype)
            table[entry], pointers[entry] = tensor, tensor.data_ptr()
        return table, pointers


def _entries_of_calls(steps: Iterable[Launched | Called]) -> set[int]:
    values = (
        value for step in steps if isinstance(step, Called) for value in (*step.arguments, *step.options.values())
    )
    return {value.entry for value in values if isinstance(value, Place)}


def _moved(step: Launched | Called, moved: dict[int, int], scratch: int) -> Launched | Called:
    """The step with the buffers that nobody sees in the scratch memory."""
    if isinstance(step, Called):
        return step
    places = (
        place._replace(entry=scratch, offset=moved[place.entry] + place.offset)
        if isinstance(place, Place) and place.entry in moved
        else place
        for place in step.places
    )
    return step._replace(places=tuple(places))


def pointer_at(place: Place | Nothing | None, pointers: Sequence[int]) -> int | None:
    return pointers[place[0]] + place[1] if place.__class__ is Place else None  # type: ignore[index]


def tensor_at(place: Place | Nothing | None, table: Sequence[Tensor | None]) -> Tensor | None:
    if place is None:
        return None
    if isinstance(place, Nothing):
        first = table[1]
        assert first is not None
        return first.new_empty(place.shape, dtype=place.dtype)
    memory = table[place.entry]
    assert memory is not None
    return place.within(memory)


def _call(step: Called, table: list[Tensor | None], pointers: list[int]) -> None:
    arguments = [tensor_at(value, table) if value.__class__ is Place else value for value in step.arguments]
    options = {
        name: tensor_at(value, table) if value.__class__ is Place else value for name, value in step.options.items()
    }
    for entry, result in zip(step.results, step.op(*arguments, **options), strict=True):
        if entry is not None:
            table[entry], pointers[entry] = result, result.data_ptr()
