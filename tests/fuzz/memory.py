"""Tensors between pages that may not be touched: an access out of bounds ends the process."""

from __future__ import annotations

import ctypes
import math
import mmap
import random

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

PAGE = mmap.PAGESIZE
SLOT = 16 * PAGE
_FORBIDDEN = 0


def _mapped(size: int) -> int:
    address: int | None = _libc.mmap(None, size, _FORBIDDEN, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise MemoryError(f"mmap of {size} bytes failed: {ctypes.get_errno()}")
    return address


class GuardedMemory:
    """A fixed number of slots, handed out in turn; a call of an op takes fewer."""

    def __init__(self, slots: int = 32) -> None:
        self._buffers = []
        start = _mapped(slots * (SLOT + PAGE) + PAGE)
        for i in range(slots):
            address = start + PAGE + i * (SLOT + PAGE)
            if _libc.mprotect(address, SLOT, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
                raise MemoryError(f"mprotect failed: {ctypes.get_errno()}")
            self._buffers.append((ctypes.c_char * SLOT).from_address(address))
        self._next = 0

    def tensor(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, draw: random.Random) -> Tensor:
        """Uninitialized, with its first or its last element at the edge of its memory; in plain memory where it is too large."""
        count = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if math.prod(size) else 0
        if count == 0:
            return torch.empty(0, dtype=dtype).as_strided(size, stride)
        if count * dtype.itemsize > SLOT:
            return torch.empty(count, dtype=dtype).as_strided(size, stride)
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        offset = 0 if draw.random() < 0.3 else SLOT - count * dtype.itemsize
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).as_strided(size, stride)
