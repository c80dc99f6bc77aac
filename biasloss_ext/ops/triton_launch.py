"""Launches of Triton kernels at the cost of a function call, and the tickets by which the last program of a kernel knows itself.

A `Launch` holds everything about a launch but its tensors. Its first call goes through Triton, which compiles the kernel;
later calls hand the pointers to the compiled kernel directly, without looking at the arguments again. So a `Launch` must be
cached by everything that Triton would look at: shapes, dtypes, which optional tensors are given, the device.

Nothing here waits for the device, and nothing is allocated but the tickets of a new stream: a step can be captured in a CUDA
graph once it has run eagerly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from biasloss_ext.ops.replay import recording

ALIGNMENT = 16  # bytes, which the compiled kernels count on
TICKETS_OF_STREAM = 1 << 12
TICKETS_OF_GRAPHS = 1 << 20


def divide_up(a: int, b: int) -> int:
    """ceil(a / b) of plain integers; `triton.cdiv` costs microseconds on the host."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


_ENTER_HOOK, _EXIT_HOOK = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)


def is_watched() -> bool:
    """Whether a profiler has hung something on Triton's launches; they take Triton's own way then."""
    return bool(_calls(_ENTER_HOOK) or _calls(_EXIT_HOOK))


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream, and x is on a GPU."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def current_stream() -> int:
    active = driver.active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


def _refuse_capture(tensors: Iterable[Tensor | None], action: str) -> None:
    """Raises where a CUDA graph is being captured: a sentence now is better than the broken context that would follow."""
    on_gpu = any(tensor is not None and tensor.is_cuda for tensor in tensors)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first step with tensors of these shapes and dtypes {action}, which a CUDA graph cannot capture: run one step "
            "with them eagerly, then capture"
        )


class Launch:
    """One kernel over one grid.

    Args:
        kernel: whose arguments are pointers first, then numbers, then constants.
        programs: size of the one-dimensional grid.
        numbers: every argument between the pointers and the constants, in order. Integers must be declared
            ``do_not_specialize``.
        constants: the ``tl.constexpr`` arguments, by name, in the order of the kernel's signature, and after them Triton's own
            options (``num_warps``, ``num_stages``).
    """

    __slots__ = ("compiled", "constants", "kernel", "numbers", "programs", "tail", "warm")

    def __init__(self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.programs = programs
        self.numbers = numbers
        self.constants = constants
        self.compiled: Any = None
        self.warm = False  # whether it has been launched
        names = kernel.arg_names
        self.tail = (*numbers, *(value for name, value in constants.items() if name in names))

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the current device."""
        if recording.recorder is not None:
            recording.recorder.launched(self, tensors)
        if self.compiled is not None and not is_watched():
            pointers: list[int | None] = []
            bits = 0
            for tensor in tensors:
                pointer = None if tensor is None else tensor.data_ptr()
                bits |= pointer or 0
                pointers.append(pointer)
            if bits % ALIGNMENT == 0:
                self.run(current_stream(), pointers)
                return
        if not self.warm:
            _refuse_capture(tensors, f"compiles {self.kernel.__name__}")
        compiled = self.kernel[(self.programs,)](*tensors, *self.numbers, **self.constants)
        self.warm = True
        # What was compiled for an unaligned tensor serves no other; the interpreter returns nothing.
        if compiled is not None and all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors):
            self.compiled = compiled

    def run(self, stream: int, pointers: Sequence[int | None]) -> None:
        """The compiled kernel, on multiples of `ALIGNMENT`."""
        compiled = self.compiled
        compiled.run(
            self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *pointers, *self.tail,
        )  # fmt: skip


_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_of_graphs: dict[torch.device, Tensor] = {}
_taken_by_graphs: dict[torch.device, int] = {}


def tickets(x: Tensor, count: int) -> Tensor:
    """``count`` zero counters beside ``x`` for a launch on the current stream, which must leave them zero.

    Launches of one stream share theirs, since they run one after another. A launch under capture gets counters of its own,
    since its graph may later run beside any other: 2**20 of them, after which the oldest are shared again.

    Raises:
        RuntimeError: the first call for a device is made under capture.
    """
    device = x.device
    count = divide_up(count, 4) * 4  # the next counters are aligned, too
    if is_capturing(x):
        ring = _of_graphs.get(device)
        if ring is None:
            _refuse_capture((x,), "allocates counters")
            raise AssertionError("a capture was refused before it could lack counters")
        first = _taken_by_graphs[device]
        if first + count > ring.numel():
            first = 0
        _taken_by_graphs[device] = first + count
        return ring[first:]
    stream = torch._C._cuda_getCurrentRawStream(device.index) if x.is_cuda else 0
    counters = _of_stream.get((device, stream))
    if counters is None or counters.numel() < count:
        size = max(TICKETS_OF_STREAM, next_power_of_two(count))
        counters = _of_stream[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
        if device not in _of_graphs:
            _of_graphs[device] = torch.zeros(TICKETS_OF_GRAPHS, dtype=torch.int32, device=device)
            _taken_by_graphs[device] = 0
    if recording.recorder is not None:
        recording.recorder.tickets_for(counters, count)
    return counters
