"""Runs calls in forked children, and says which ended one."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import resource
import signal
import struct
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from biasloss_ext.ops.registry import OPS
from tests.fuzz.calls import Call, Drawing

CALLS_OF_CHILD = 20_000
SECONDS_OF_CALL = 60.0
MEMORY_OF_CHILD = 4 << 30  # above what the process has: a huge allocation fails instead of filling the machine
FOUND = 3  # exit status of a child
EXPECTED_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, MemoryError, NotImplementedError)


@dataclass
class Finding:
    number: int
    what: str
    call: str = ""

    def __str__(self) -> str:
        return f"call {self.number}: {self.what}: {self.call}"


def fuzz(seed: int, first: int, count: int, *, show_progress: bool = False) -> list[Finding]:
    """All findings among calls ``first`` to ``first + count - 1``."""
    findings, number, end = [], first, first + count
    while number < end:
        number, finding = _run_child(seed, number, min(end, number + CALLS_OF_CHILD))
        if finding is not None:
            findings.append(finding)
            print(finding, flush=True)
        if show_progress:
            print(f"{number - first} calls", flush=True)
    return findings


def _run_child(seed: int, first: int, end: int) -> tuple[int, Finding | None]:
    """Run until ``end`` or the first finding; the number to go on with."""
    with mmap.mmap(-1, 4096) as shared:
        shared[:8] = struct.pack("q", first)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _child(seed, first, end, shared)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status, reached = _watch(pid, shared)
        if status == 0:
            return end, None
        text = shared[8:].split(b"\0")[0].decode(errors="replace")
        if status == FOUND:
            what, _, call = text.partition("\n")
            return reached + 1, Finding(reached, what, call)
        if status > 0:
            raise RuntimeError(f"the fuzzer itself failed at call {reached}, see above: {text}")
        return reached + 1, Finding(reached, signal.Signals(-status).name, text)


def _watch(pid: int, shared: mmap.mmap) -> tuple[int, int]:
    seen, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        reached = struct.unpack("q", shared[:8])[0]
        if done:
            return os.waitstatus_to_exitcode(status), reached
        if reached != seen:
            seen, since = reached, time.monotonic()
        elif time.monotonic() - since > SECONDS_OF_CALL:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _child(seed: int, first: int, end: int, shared: mmap.mmap) -> int:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_OF_CHILD,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(2)
    drawing = Drawing(seed)
    for number in range(first, end):
        call = drawing.call(number)
        text = str(call).encode()[: len(shared) - 200]
        shared[:8] = struct.pack("q", number)
        shared[8 : 8 + len(text) + 1] = text + b"\0"
        what = run(call, number)
        if what is not None:
            text = f"{what}\n{call}".encode()[: len(shared) - 200]
            shared[8:] = text.ljust(len(shared) - 8, b"\0")
            return FOUND
    return 0


def run(call: Call, number: int) -> str | None:
    """What is wrong about a call that returns, if anything."""
    before = dict(_contents(call))
    try:
        outputs = OPS[call.op].native(**call.arguments)
        if call.op == "bias_loss" and number % 2:
            _backward(call)
    except EXPECTED_ERRORS as error:
        if "INTERNAL ASSERT" in str(error):
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        del outputs
    changed = [name for name, digest in _contents(call) if digest != before.get(name, digest)]
    return f"changed its input {', '.join(changed)}" if changed else None


def _backward(call: Call) -> None:
    """Through autograd, with classes that changed since the forward pass."""
    arguments = dict(call.arguments)
    output, target = arguments["output"], arguments["target"]
    if output.device.type == "meta" or target.device.type == "meta" or not output.is_floating_point():
        return
    leaf = output.detach().clone().requires_grad_()
    target = arguments["target"] = target.clone()
    loss = OPS["bias_loss"].native(**{**arguments, "output": leaf})[0]
    if not target.is_floating_point() and target.numel():
        target.data.view(-1)[::2] = {torch.uint8: 255}.get(target.dtype, 2**31 - 1)
    with contextlib.suppress(*EXPECTED_ERRORS):
        loss.sum().backward()


def _contents(call: Call) -> Iterator[tuple[str, bytes]]:
    for name, value in call.arguments.items():
        if name not in call.mutable and isinstance(value, Tensor) and value.device.type == "cpu" and value.numel():
            dense = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
            yield name, hashlib.blake2b(dense.view(torch.uint8).numpy().tobytes(), digest_size=8).digest()
