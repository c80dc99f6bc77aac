"""The check for races in TTGIR finds them, and nothing where there is a barrier. `test_resources` runs it on the package."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import triton
import triton.language as tl

from tests.triton_resources.ahead_of_time import launches_of, ttgir_of
from tests.triton_resources.races import hazards, parse


@triton.jit
def two_passes(values_ptr, total_ptr, count, BARRIERS: tl.constexpr, N: tl.constexpr):
    """Passes over values left by an earlier kernel, as a loss does with its weights: sum, divide, sum blocks of the results."""
    total = 0.0
    for start in range(0, count, N):
        index = start + tl.arange(0, N)
        total += tl.sum(tl.load(values_ptr + index, mask=index < count, other=0.0), 0)
    if BARRIERS:
        tl.debug_barrier()
    for start in range(0, count, N):
        index = start + tl.arange(0, N)
        value = tl.load(values_ptr + index, mask=index < count, other=0.0)
        if BARRIERS:
            tl.debug_barrier()
        tl.store(values_ptr + index, value / total, mask=index < count)
        if BARRIERS:
            tl.debug_barrier()
    tl.store(total_ptr, total)


@triton.jit
def around_the_loop(values_ptr, count, N: tl.constexpr):
    """Each turn loads what the one before stored; the barrier is between a load and the store of its own turn only."""
    for start in range(0, count, N):
        value = tl.load(values_ptr + start + tl.arange(0, N))
        tl.debug_barrier()
        tl.store(values_ptr + start + N + tl.arange(0, N), value)


@triton.jit
def in_a_branch(values_ptr, count, BARRIER: tl.constexpr, N: tl.constexpr):
    """A barrier on one way alone."""
    index = tl.arange(0, N)
    value = tl.load(values_ptr + index)
    if count > 3:
        tl.debug_barrier()
    else:
        value += 1.0
        if BARRIER:
            tl.debug_barrier()
    tl.store(values_ptr + N - index, value)


@triton.jit
def carried_pointer(values_ptr, other_ptr, count, N: tl.constexpr):
    """The pointer walks through a loop, and is chosen between two."""
    pointers = values_ptr + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for _ in range(0, count):
        total += tl.load(pointers)
        pointers += N
    chosen = tl.where(tl.arange(0, N) < count, pointers, other_ptr + tl.arange(0, N))
    tl.store(chosen, total)


@triton.jit
def while_loop(values_ptr, count, N: tl.constexpr):
    index = count
    while index > 0:
        value = tl.load(values_ptr + index + tl.arange(0, N))
        tl.store(values_ptr + index * 2 + tl.arange(0, N), value)
        index -= N


@triton.jit
def last_program(partials_ptr, ticket_ptr, out_ptr, total, N: tl.constexpr):
    """What every finishing kernel does: store, take a ticket, and let the last program load what the others stored."""
    index = tl.arange(0, N)
    tl.store(partials_ptr + tl.program_id(0) * N + index, index.to(tl.float32))
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == total - 1
    if last:
        tl.store(ticket_ptr, 0)
        tl.store(out_ptr + index, tl.load(partials_ptr + index, cache_modifier=".cg"))


@triton.jit
def result_of_no_use(ticket_ptr, out_ptr):
    """Without a use of its result an atomic operation has no barrier behind it."""
    tl.atomic_add(ticket_ptr, 1)
    tl.store(out_ptr, tl.load(ticket_ptr))


@triton.jit
def returns_early(values_ptr, count):
    if count > 3:
        return
    tl.store(values_ptr, 1.0)


def found(kernel: Any, *arguments: Any, capability: int = 90, **constants: Any) -> list[tuple[str, str, str]]:
    """(pointer, kind of the first access, kind of the second)."""
    (launch,) = launches_of(lambda: kernel[(1,)](*arguments, num_warps=4, **constants))
    return [
        (hazard.pointer, *(access.split(" at ")[0] for access in (hazard.first, hazard.second)))
        for hazard in hazards(ttgir_of(launch, capability))
    ]


def values() -> torch.Tensor:
    return torch.empty(1024)


LOAD_STORE, STORE_LOAD = ("values_ptr", "load", "store"), ("values_ptr", "store", "load")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_weights_loaded_twice_and_stored_without_a_barrier_are_found(capability: int) -> None:
    racing = found(two_passes, values(), values(), 1000, BARRIERS=False, N=64, capability=capability)
    assert set(racing) == {LOAD_STORE, STORE_LOAD}
    assert found(two_passes, values(), values(), 1000, BARRIERS=True, N=64, capability=capability) == []


def test_what_comes_around_a_loop_is_found() -> None:
    assert found(around_the_loop, values(), 1000, N=64) == [STORE_LOAD]


def test_a_barrier_is_needed_on_every_way() -> None:
    assert found(in_a_branch, values(), 5, BARRIER=False, N=64) == [LOAD_STORE]
    assert found(in_a_branch, values(), 5, BARRIER=True, N=64) == []


def test_pointers_are_followed_through_loops_and_choices() -> None:
    assert found(carried_pointer, values(), values(), 5, N=64) == [LOAD_STORE]


def test_a_while_loop_is_followed() -> None:
    assert set(found(while_loop, values(), 512, N=64)) == {LOAD_STORE, STORE_LOAD}


def test_a_ticket_orders_stores_before_loads() -> None:
    counter = torch.zeros(4, dtype=torch.int32)
    assert found(last_program, values(), counter, values(), 7, N=64) == []


def test_an_atomic_operation_without_a_use_orders_nothing() -> None:
    counter = torch.zeros(4, dtype=torch.int32)
    assert found(result_of_no_use, counter, values()) == [("ticket_ptr", "atomic operation", "load")]


def test_a_hazard_names_the_lines_of_the_source() -> None:
    (launch,) = launches_of(lambda: around_the_loop[(1,)](values(), 1000, N=64, num_warps=4))
    first, second = re.findall(r"test_races\.py:(\d+)", str(hazards(ttgir_of(launch, 90))[0]))
    start = around_the_loop.starting_line_number
    assert (int(first) - start, int(second) - start) == (6, 4)


def test_what_is_not_understood_is_refused() -> None:
    (launch,) = launches_of(lambda: returns_early[(1,)](values(), 5, num_warps=4))
    with pytest.raises(ValueError, match=r"cf\.\w+ is not followed"):
        hazards(ttgir_of(launch, 90))
    (launch,) = launches_of(lambda: around_the_loop[(1,)](values(), 1000, N=64, num_warps=4))
    text = ttgir_of(launch, 90)
    assert [operation.name for operation in parse(text)[1]].count("scf.for") == 1
    with pytest.raises(ValueError, match="takes a pointer, and it is not known what it does"):
        hazards(text.replace("tt.store ", "tt.unheard_of "))
    with pytest.raises(ValueError, match="has a region"):
        hazards(text.replace("scf.for", "scf.unheard_of"))
