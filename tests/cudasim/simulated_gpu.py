"""Builds the simulated GPU: the launchers of CUDA kernels, compiled for the CPU, in an op library for CPU tensors.

    export BIASLOSS_SIMULATED_GPU=$(python -m tests.cudasim.simulated_gpu)

In a process with this variable, CPU tensors stand in for a GPU's: backend "cuda" runs on them. `BIASLOSS_SIMULATED_SEED`,
`BIASLOSS_SIMULATED_MULTIPROCESSORS` and `BIASLOSS_SIMULATED_RESIDENT_BLOCKS` say how; `Simulator` changes it at run time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cudasim.build import HERE, PLAIN, ROOT, SANITIZE, run_ninja, write_if_changed

CSRC = ROOT / "csrc"
LIBRARY = "simulated_gpu.so"
FLAGS = "-std=c++20 -g1 -fPIC -fvisibility=hidden -DCUDASIM -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi"
# As setup.py has it.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_STABLE_ONLY"
SIMULATOR = ("fiber", "library", "scheduler", "self_test_device", "shared_memory", "simulated_device", "types")


@dataclass(frozen=True)
class Fault:
    """A launcher with a mistake in it: ``old`` in ``file``, which has it once, becomes ``new``."""

    file: str  # in csrc
    old: str
    new: str

    def text(self) -> str:
        text = (CSRC / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times {self.old!r}, expected it once")
        return text.replace(self.old, self.new)


def launchers() -> list[Path]:
    return sorted(CSRC.rglob("*.cu"))


def object_of(source: Path) -> str:
    return f"{source.parent.name}_{source.stem}.o"


def build(sanitize: bool = False, fault: Fault | None = None) -> Path:
    """The path of the up-to-date library. One with a fault shares all other objects with the right one.

    Raises:
        RuntimeError: it does not compile; the message has the compiler's.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    folder = ROOT / "build" / f"simulated-gpu-torch-{torch.__version__}{'-sanitized' if sanitize else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    optimization = SANITIZE if sanitize else PLAIN
    includes = [f"-I{HERE}", f"-I{CSRC}", *(f"-isystem {path}" for path in include_paths("cpu"))]
    flags = " ".join([FLAGS, STABLE_ABI, "$optimization", *includes])
    sources = {object_of(path): path for path in launchers()}
    library, rules = folder / LIBRARY, folder / "build.ninja"
    if fault is not None:
        wrong = folder / "fault" / Path(fault.file).name
        wrong.parent.mkdir(exist_ok=True)
        write_if_changed(wrong, fault.text())
        right = CSRC / fault.file
        del sources[object_of(right)]
        sources["fault.o"] = wrong
        neighbors = f" -I{right.parent}"
        library, rules = folder / "fault.so", folder / "fault.ninja"
    sources |= {f"{name}.o": HERE / f"{name}.cpp" for name in SIMULATOR}
    torch_libraries = Path(torch.__file__).parent / "lib"
    lines = [
        f"optimization = {optimization}",
        "rule compile",
        f"  command = g++ {flags} -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $optimization $in -L{torch_libraries} -ltorch_cpu -o $out",
        *(f"build {target}: compile {source}" for target, source in sources.items()),
        f"build {library.name}: link {' '.join(sources)}",
    ]
    if fault is not None:  # compiled for one run
        lines.insert(
            lines.index(f"build fault.o: compile {wrong}") + 1, f"  optimization = {optimization} -O0{neighbors}"
        )
    write_if_changed(rules, "\n".join(lines) + "\n")
    run_ninja(folder, rules.name)
    return library


@dataclass(frozen=True)
class Launch:
    """What a launch asked for."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    captured: bool


class Simulator:
    """Drives the simulated GPU of this process."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["BIASLOSS_SIMULATED_GPU"])
        for name in ("take_barriers", "take_launches"):
            getattr(self.library, f"biasloss_simulator_{name}").restype = ctypes.c_char_p
        for name in ("set", "try_launch", "try_shared", "try_capture"):
            getattr(self.library, f"biasloss_simulator_{name}").restype = ctypes.c_long

    @contextmanager
    def using(self, *, skipped_barrier: str = "", **settings: int) -> Iterator[None]:
        """With other multiprocessors, seed, resident_blocks, capturing; without the barrier at "file.cuh:12"."""
        before = {name: self._set(name, value) for name, value in settings.items()}
        self.library.biasloss_simulator_skip_barrier(skipped_barrier.encode())
        try:
            yield
        finally:
            self.library.biasloss_simulator_skip_barrier(b"")
            for name, value in before.items():
                self._set(name, value)

    def take_barriers(self) -> list[str]:
        """Where blocks have met since the last call, "file.cuh:12" each."""
        return sorted(self.library.biasloss_simulator_take_barriers().decode().split())

    def take_launches(self) -> list[Launch]:
        """Since the last call."""
        found = []
        for line in self.library.biasloss_simulator_take_launches().decode().splitlines():
            x, y, z, threads, shared_bytes, captured = map(int, line.split())
            found.append(Launch((x, y, z), threads, shared_bytes, bool(captured)))
        return found

    def _set(self, name: str, value: int) -> int:
        before: int = self.library.biasloss_simulator_set(name.encode(), ctypes.c_long(value))
        if before < 0:
            raise ValueError(f"the simulated GPU has no setting {name!r}")
        return before


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv))
