"""The machine: what it is, and what it can do at most."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from biasloss_ext.benchmarks.contender import dtype_name
from biasloss_ext.benchmarks.timing import WallClock
from biasloss_ext.version import __version__

PACKAGES = ("triton", "numpy", "torchvision", "onnxruntime", "openvino", "ncnn", "liger-kernel")
DEFAULT_CACHE = 32 * 2**20
SETS_AT_MOST = 32
BYTES_AT_MOST = 2**30
# Virtual machines report caches that they share with others; and CPUs are slow to draw random numbers.
CPU_BYTES_AT_MOST = 2**27
CACHED_AT_MOST = 2**24


def describe(device: torch.device) -> dict[str, Any]:
    """Name, cores, memory and caches of the device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": cache_bytes(device),
        }
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": cache_bytes(device),
    }


def versions() -> dict[str, str]:
    """This package, Python, PyTorch and the packages that contenders come from."""
    found = {"biasloss_ext": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def load() -> float | None:
    """Processes that want to run, a core; above 1 they wait for each other. None where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=DEFAULT_CACHE)


def input_sets(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs are needed for none of them to be in the cache when its turn comes again."""
    wanted = 1 + 2 * cache_bytes(device) // max(set_bytes, 1)
    return max(2, min(wanted, SETS_AT_MOST, _bytes_at_most(device) // max(set_bytes, 1)))


def _bytes_at_most(device: torch.device) -> int:
    return BYTES_AT_MOST if device.type == "cuda" else CPU_BYTES_AT_MOST


def ceilings(device: torch.device, *, tiny: bool = False) -> dict[str, float]:
    """Bytes a second of a copy (read and written) and of large and cached reads; FLOP a second of a product.

    On a CPU the copy reads one part after the other of more than the caches hold, at most 128 MiB, and writes where it wrote
    before, as an op does whose inputs are new and whose output takes the memory of the one before.
    """
    large = 2**16 if tiny else min(max(4 * cache_bytes(device), 2**28), _bytes_at_most(device))
    cached = large if tiny else min(cache_bytes(device) // 2, CACHED_AT_MOST)
    side = 64 if tiny else (8192 if device.type == "cuda" else 2048)
    a = torch.rand(large // 4, device=device)
    parts = equal_parts(a, cached // 4) if device.type == "cpu" else (a,)
    b = torch.empty_like(parts[0])
    small = torch.rand(cached // 4, device=device)
    found = {
        "copy": 2 * b.nbytes / _seconds(lambda turn: b.copy_(parts[turn % len(parts)]), device),
        "read": large / _seconds(lambda turn: a.sum(), device),
        "read_cached": cached / _seconds(lambda turn: small.sum(), device),
    }
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[f"matmul {dtype_name(dtype)}"] = 2 * side**3 / _seconds(lambda turn: left @ right, device)  # noqa: B023
    return found


def equal_parts(a: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    """``a``, (n,), in parts of ``length``; what is left over at its end is left out."""
    parts: tuple[torch.Tensor, ...] = a[: a.numel() // length * length].split(length)
    return parts


def slug(text: str) -> str:
    """For file names: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _seconds(call: Any, device: torch.device) -> float:
    clock = WallClock(call, device)
    return min(clock.sample() for _ in range(9))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _size(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]?)\s*", text).groups()  # type: ignore[union-attr]
    return int(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit]
