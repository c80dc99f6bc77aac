"""Finds races of a program of a Triton kernel with itself, in its TTGIR.

Triton puts barriers around shared memory, none around global memory: where a kernel loads through a pointer and stores through
the same pointer, threads of one program run into each other unless the kernel asks for a barrier between. Even the same tile at
the same layout is no excuse, since several threads hold, and load, an element that one of them stores.

`hazards` follows every path through the kernel and notes what each pointer argument was accessed for since the last barrier.
It knows the operations that the package's kernels are made of and refuses any other that takes a pointer or has a region.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ACCESSES = {
    "tt.load": "load",
    "tt.store": "store",
    "tt.atomic_rmw": "atomic operation",
    "tt.atomic_cas": "atomic operation",
    "ttg.async_copy_global_to_local": "load",
}
BARRIERS = {"gpu.barrier", "ttg.barrier"}
# They make pointers of pointers.
POINTER_OPERATIONS = {
    "tt.addptr",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "tt.bitcast",
    "ttg.convert_layout",
    "arith.select",
    "scf.yield",
    "scf.for",
    "scf.if",
    "scf.while",
    "scf.condition",
}
REGIONS_WITHOUT_MEMORY = {"tt.reduce", "tt.scan", "tt.map_elementwise"}

_LOCATION = re.compile(r" loc\((?:[^()\"]|\"[^\"]*\"|\((?:[^()\"]|\"[^\"]*\")*\))*\)")
_ALIAS = re.compile(r"^(#loc\w*) = loc\((.*)\)$")
_LINE = re.compile(r"\"([^\"]+)\":(\d+):\d+")
_OPERATION = re.compile(r"^(?:(?P<results>%[\w#:, %-]+?) = )?\"?(?P<name>[a-z_]\w*\.[\w.]+)\"?(?P<rest>.*)$")
_VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
_ARGUMENT = re.compile(r"(%\w+): !tt\.ptr<")
_ITERATED = re.compile(r"(%[\w-]+) = (%[\w-]+(?:#\d+)?)")

Roots = frozenset[str]
NOTHING: Roots = frozenset()


@dataclass(frozen=True)
class Access:
    kind: str
    line: str  # of the kernel's source


@dataclass(frozen=True, order=True)
class Hazard:
    """Two accesses through ``pointer`` without a barrier between."""

    pointer: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.pointer}: {self.first}, then {self.second}, without a barrier between"


@dataclass(frozen=True)
class Operation:
    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    text: str
    line: str
    regions: tuple[tuple[Operation, ...], ...] = ()


@dataclass
class State:
    """What every pointer was accessed for since the last barrier, on some path that leads here."""

    accesses: dict[str, frozenset[Access]] = field(default_factory=dict)

    def copy(self) -> State:
        return State(dict(self.accesses))

    def join(self, other: State) -> None:
        for pointer, accesses in other.accesses.items():
            self.accesses[pointer] = self.accesses.get(pointer, frozenset()) | accesses


def hazards(ttgir: str) -> list[Hazard]:
    """Every race of a program with itself.

    Raises:
        ValueError: an operation that is not understood.
    """
    arguments, operations = parse(ttgir)
    walk = _Walk({name: frozenset((name.removeprefix("%"),)) for name in arguments})
    walk.block(operations, State())
    return sorted(walk.found)


class _Walk:
    def __init__(self, roots: dict[str, Roots]) -> None:
        # Pointer arguments that a value is made of. Regions that have no value in common may use one name for different values.
        self.roots = roots
        self.found: set[Hazard] = set()

    def block(self, operations: tuple[Operation, ...], state: State) -> tuple[State, tuple[Roots, ...]]:
        """(state at the end, roots of what the block yields)."""
        used = {operand for operation in _all(operations) for operand in operation.operands}
        yielded: tuple[Roots, ...] = ()
        for operation in operations:
            pointers = tuple(self.roots.get(operand, NOTHING) for operand in operation.operands)
            if any(pointers) and operation.name not in POINTER_OPERATIONS and operation.name not in ACCESSES:
                raise ValueError(
                    f"{operation.name} takes a pointer, and it is not known what it does: {operation.text}"
                )
            if operation.name in ("scf.yield", "scf.condition"):
                yielded = pointers[1:] if operation.name == "scf.condition" else pointers
            elif operation.name in BARRIERS:
                state = State()
            elif operation.name in ACCESSES:
                state = self.access(operation, state, used)
            elif operation.name == "scf.if":
                state = self.branch(operation, state)
            elif operation.name in ("scf.for", "scf.while"):
                state = self.loop(operation, state)
            else:
                joined = NOTHING.union(*pointers)
                for result in operation.results:
                    self.roots[result] = joined
        return state, yielded

    def access(self, operation: Operation, state: State, used: set[str]) -> State:
        own = Access(ACCESSES[operation.name], operation.line)
        after = state.copy()
        for pointer in NOTHING.union(*(self.roots.get(operand, NOTHING) for operand in operation.operands)):
            for earlier in state.accesses.get(pointer, frozenset()):
                if earlier.kind != own.kind:
                    first, second = (f"{a.kind} at {a.line}" for a in (earlier, own))
                    self.found.add(Hazard(pointer, first, second))
            after.accesses[pointer] = state.accesses.get(pointer, frozenset()) | {own}
        self.bind(operation.results, (NOTHING,) * len(operation.results))
        # One thread makes an atomic operation on a scalar; a barrier comes before the others get its result.
        scalar = own.kind == "atomic operation" and "tensor<" not in operation.text
        return State() if scalar and any(result in used for result in operation.results) else after

    def branch(self, operation: Operation, state: State) -> State:
        after, yielded = self.block(operation.regions[0], state.copy())
        if len(operation.regions) == 1:
            after.join(state)
        else:
            other, other_yielded = self.block(operation.regions[1], state.copy())
            after.join(other)
            yielded = tuple(a | b for a, b in zip(yielded, other_yielded, strict=True))
        self.bind(operation.results, yielded)
        return after

    def loop(self, operation: Operation, state: State) -> State:
        """Until nothing new comes around; a loop may also run not at all."""
        # "scf.for %i = %a to %b step %c iter_args(%x = %y)", "scf.while (%x = %y)"
        _, found, text = operation.text.partition("iter_args" if operation.name == "scf.for" else "scf.while")
        pairs = _ITERATED.findall(text) if found else []
        carried = tuple(self.roots.get(initial, NOTHING) for _, initial in pairs)
        after = state.copy()
        while True:
            before = (dict(after.accesses), carried)
            self.bind([name for name, _ in pairs], carried)
            end, yielded = after.copy(), carried
            for index, region in enumerate(operation.regions):
                if index > 0:  # of scf.while: the body takes what the condition passes on
                    self.bind(_block_arguments(region), yielded)
                end, yielded = self.block(region, end)
                if index == 0:
                    passed, left = yielded, end.copy()
            after.join(end)
            carried = tuple(a | b for a, b in zip(carried, yielded, strict=True)) if pairs else ()
            if before == (after.accesses, carried):
                break
        # A loop of scf.while is left from its condition.
        while_loop = len(operation.regions) > 1
        self.bind(operation.results, passed if while_loop else carried)
        return left if while_loop else after

    def bind(self, names: tuple[str, ...] | list[str], roots: tuple[Roots, ...]) -> None:
        for name, own in zip(names, roots, strict=False):
            self.roots[name] = own


def _all(operations: tuple[Operation, ...]) -> Iterator[Operation]:
    for operation in operations:
        yield operation
        for region in operation.regions:
            yield from _all(region)


def _block_arguments(region: tuple[Operation, ...]) -> list[str]:
    return list(region[0].results) if region and region[0].name == "block.arguments" else []


def parse(ttgir: str) -> tuple[list[str], tuple[Operation, ...]]:
    """(pointer arguments, operations) of the only function of a module."""
    source = _source_lines(ttgir)
    lines = [line.strip() for line in ttgir.splitlines()]
    starts = [index for index, line in enumerate(lines) if line.startswith("tt.func")]
    if len(starts) != 1:
        raise ValueError(f"expects one function in the module, found {len(starts)}")
    # The arguments' own locations contain line breaks in no version.
    head = _LOCATION.sub("", lines[starts[0]])
    reader = _Reader(lines[starts[0] + 1 :], source)
    return _ARGUMENT.findall(head), reader.block()


class _Reader:
    def __init__(self, lines: list[str], source: dict[str, str]) -> None:
        self.lines = lines
        self.source = source
        self.next = 0

    def block(self) -> tuple[Operation, ...]:
        """Up to the line that closes it, which is left for the caller in `closing`."""
        operations = []
        while True:
            raw = self.lines[self.next]
            self.next += 1
            line = _LOCATION.sub("", raw)
            if line.startswith("}"):
                self.closing = line
                return tuple(operations)
            if line.startswith("^"):
                names = tuple(_VALUE.findall(line))
                operations.append(Operation("block.arguments", names, (), line, ""))
            elif line:
                operations.append(self.operation(line, raw))

    def operation(self, line: str, raw: str) -> Operation:
        match = _OPERATION.match(line)
        if match is None:
            raise ValueError(f"not understood: {line}")
        name, rest = match["name"], match["rest"]
        if name.startswith("cf.") or name == "tt.call":
            raise ValueError(f"{name} is not followed: let the kernel return at its end, and inline what it calls")
        regions = []
        if line.endswith("{"):
            if name in REGIONS_WITHOUT_MEMORY:
                self.block()
            elif name in ("scf.for", "scf.if", "scf.while"):
                regions.append(self.block())
                while self.closing.endswith("{"):
                    regions.append(self.block())
            else:
                raise ValueError(f"{name} has a region, and it is not known how it runs: {line}")
        operands = tuple(_VALUE.findall(rest.split(" : ", 1)[0] if name != "scf.while" else rest))
        return Operation(name, _results(match["results"]), operands, line, self.line_of(raw), tuple(regions))

    def line_of(self, raw: str) -> str:
        found = re.findall(r"loc\((#loc\w*)\)", raw)
        return self.source.get(found[-1], "an unknown line") if found else "an unknown line"


def _results(text: str | None) -> tuple[str, ...]:
    """ "%a:3" are %a#0 to %a#2."""
    found: list[str] = []
    for part in (text or "").split(","):
        name, _, count = part.strip().partition(":")
        found += [f"{name}#{index}" for index in range(int(count))] if count else [name]
    return tuple(name for name in found if name)


def _source_lines(ttgir: str) -> dict[str, str]:
    """File and line of every alias of a location: the innermost of inlined calls."""
    aliases = dict(match.groups() for line in ttgir.splitlines() if (match := _ALIAS.match(line.strip())))

    def line_of(text: str, depth: int = 0) -> str:
        direct = _LINE.search(text)
        if direct is not None:
            return f"{direct[1].rsplit('/', 1)[-1]}:{direct[2]}"
        inner = re.search(r"#loc\w*", text)
        return line_of(aliases.get(inner[0], ""), depth + 1) if inner is not None and depth < 50 else "an unknown line"

    return {name: line_of(text) for name, text in aliases.items()}
