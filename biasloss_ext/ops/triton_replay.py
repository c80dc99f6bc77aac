"""A recorded sequence of launches, replayed on other tensors; see :mod:`biasloss_ext.ops.replay`.

A replay fills a table of tensors, and one of their addresses: counters, inputs, buffers, an entry for "no tensor", and the
scratch memory, in which buffers lie that nobody sees. Steps take their tensors from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import triton_launch
from biasloss_ext.ops.replay import TICKETS, Called, Launched, Nothing, Place, Recorder, Tensors, is_ready

SCRATCH_ALIGNMENT = 256  # bytes

Table = list[Tensor | None]
Addresses = list[int]


class Buffer(NamedTuple):
    """A tensor that a replay allocates: as an input of the same dtype allocates another, which costs half of naming one."""

    entry: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    like: int  # the entry of that input; that of no tensor where there is none
    dtype: torch.dtype


class LaunchStep:
    """A launch, by the places of its tensors."""

    def __init__(self, launched: Launched, no_tensor: int) -> None:
        self.launch, self.places = launched
        self.addresses = [(p.entry, p.offset) if isinstance(p, Place) else (no_tensor, 0) for p in self.places]

    def pointers(self, addresses: Addresses) -> list[int]:
        return [addresses[entry] + offset for entry, offset in self.addresses]


class CallStep:
    """A call of a compiled op. Its tensors are entries of the table, or parts of entries."""

    def __init__(self, called: Called, layouts: dict[int, Place]) -> None:
        self.op, self.results = called.op, called.results
        self.arguments, self.options = list(called.arguments), called.options
        self.placed_arguments = _placed(enumerate(called.arguments), layouts)
        self.placed_options = _placed(called.options.items(), layouts)

    def run(self, table: Table, addresses: Addresses) -> None:
        arguments, options = self.arguments.copy(), self.options.copy()
        for index, entry, part in self.placed_arguments:
            arguments[index] = table[entry] if part is None else tensor_at(part, table)
        for name, entry, part in self.placed_options:
            options[name] = table[entry] if part is None else tensor_at(part, table)
        for written, result in zip(self.results, self.op(*arguments, **options), strict=True):
            if written is not None:
                table[written], addresses[written] = result, result.data_ptr()


def _placed(values: Iterable[tuple[Any, Any]], layouts: dict[int, Place]) -> list[tuple[Any, int, Place | None]]:
    """Names of tensors, their entries, and their places where these are only a part of the entry."""
    return [
        (name, place.entry, None if place == layouts.get(place.entry) else place)
        for name, place in values
        if isinstance(place, Place)
    ]


class Recording:
    """The steps of a function, and how its results follow from inputs and buffers."""

    def __init__(self, recorder: Recorder, results: tuple[Place | Nothing | None, ...]) -> None:
        self.tickets = recorder.tickets
        self.no_tensor = 1 + len(recorder.inputs) + len(recorder.allocated)
        self.first_buffer = 1 + len(recorder.inputs)
        of_compiled = {entry for step in recorder.steps if isinstance(step, Called) for entry in step.results}
        kept = {place.entry for place in results if isinstance(place, Place)} | _entries_of_calls(recorder.steps)
        like = {t.dtype: entry for entry, t in reversed([*enumerate(recorder.inputs, 1)]) if t is not None}
        self.buffers: list[Buffer] = []
        self.parts: list[tuple[int, int]] = []  # entry, and offset in the scratch memory
        self.scratch = 0  # bytes
        for entry, tensor in recorder.allocated.items():
            if entry in of_compiled or tensor.numel() == 0:
                continue
            if entry in kept:
                layout = (tuple(tensor.shape), tensor.stride())
                self.buffers.append(Buffer(entry, *layout, like.get(tensor.dtype, self.no_tensor), tensor.dtype))
            else:
                self.parts.append((entry, self.scratch))
                self.scratch += -(-tensor.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        whole = [*enumerate(recorder.inputs, 1), *recorder.allocated.items()]
        self.layouts = {entry: Place.of(t, entry, t.data_ptr()) for entry, t in whole if t is not None}
        self.steps = [
            CallStep(step, self.layouts) if isinstance(step, Called) else LaunchStep(step, self.no_tensor)
            for step in recorder.steps
        ]
        self._results(results)

    def _results(self, results: tuple[Place | Nothing | None, ...]) -> None:
        """Sort results into those that are an entry of the table as it is, and others."""
        entries: list[int] = []
        self.others: list[tuple[int, Place | Nothing]] = []
        for index, place in enumerate(results):
            is_whole = isinstance(place, Place) and place == self.layouts.get(place.entry)
            entries.append(place.entry if is_whole else self.no_tensor)  # type: ignore[union-attr]
            if place is not None and not is_whole:
                self.others.append((index, place))
        self.from_table: Callable[[Table], tuple[Tensor | None, ...]] = _getter(entries)

    def replay(self, inputs: Tensors) -> Tensors | None:
        """The results for other inputs of the same shapes, strides and dtypes; None where the recording cannot serve."""
        memory = self.memory(inputs)
        if memory is None:
            return None
        table, addresses = memory
        stream: int | None = None
        for step in self.steps:
            if isinstance(step, CallStep):
                step.run(table, addresses)
            elif step.launch.compiled is None:  # Triton's interpreter takes tensors
                self.enter_parts(table)
                step.launch(*[tensor_at(place, table) for place in step.places])
            else:
                stream = triton_launch.current_stream() if stream is None else stream
                step.launch.run(stream, step.pointers(addresses))
        results = self.from_table(table)
        if not self.others:
            return results
        found = list(results)
        for index, place in self.others:
            found[index] = tensor_at(place, table)
        return tuple(found)

    def memory(self, inputs: Tensors) -> tuple[Table, Addresses] | None:
        """The table of tensors that the places point into, and their addresses; None where the recording cannot serve."""
        addresses, bits = [0], 0
        for tensor in inputs:
            address = 0 if tensor is None else tensor.data_ptr()
            bits |= address
            addresses.append(address)
        first = inputs[0]
        assert first is not None
        if bits % triton_launch.ALIGNMENT or triton_launch.is_watched() or not is_ready(first):
            return None
        table: Table = [None, *inputs]
        others = self.no_tensor + 2 - self.first_buffer
        table += [None] * others
        addresses += [0] * others
        if self.tickets:
            counters = triton_launch.tickets(first, self.tickets)
            table[TICKETS], addresses[TICKETS] = counters, counters.data_ptr()
        if self.scratch:
            memory = first.new_empty(self.scratch, dtype=torch.uint8)
            table[-1], base = memory, memory.data_ptr()
            for entry, offset in self.parts:
                addresses[entry] = base + offset
        for entry, shape, strides, like, dtype in self.buffers:
            of_dtype = table[like]
            if of_dtype is None:
                tensor = first.new_empty_strided(shape, strides, dtype=dtype)
            else:
                tensor = of_dtype.new_empty_strided(shape, strides)
            table[entry], addresses[entry] = tensor, tensor.data_ptr()
        return table, addresses

    def enter_parts(self, table: Table) -> None:
        """Enter the buffers in the scratch memory as tensors."""
        memory = table[-1]
        for entry, offset in self.parts:
            assert memory is not None
            table[entry] = self.layouts[entry]._replace(offset=offset).within(memory)


def _getter(entries: list[int]) -> Callable[[Table], tuple[Tensor | None, ...]]:
    if len(entries) > 1:
        return itemgetter(*entries)
    return lambda table: tuple([table[entry] for entry in entries])


def _entries_of_calls(steps: Iterable[Launched | Called]) -> set[int]:
    values = (
        value for step in steps if isinstance(step, Called) for value in (*step.arguments, *step.options.values())
    )
    return {value.entry for value in values if isinstance(value, Place)}


def tensor_at(place: Any, table: Table) -> Tensor | None:
    if place is None:
        return None
    if isinstance(place, Nothing):
        first = table[1]
        assert first is not None
        return first.new_empty(place.shape, dtype=place.dtype)
    memory = table[place.entry]
    assert memory is not None
    return place.within(memory)  # type: ignore[no-any-return]
