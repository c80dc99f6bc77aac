"""Compiles the kernels for a GPU that need not be here, and reads registers, stack and instructions out of the result."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DTYPES = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}


@dataclasses.dataclass
class Kernel:
    name: str
    dtype: str
    registers: int
    stack: int
    local: int
    lines: list[str]

    def loops(self) -> list[list[str]]:
        """The instructions between a label and a branch back to it, innermost loops only."""
        label_at: dict[str, int] = {}
        spans: list[tuple[int, int]] = []
        for number, line in enumerate(self.lines):
            label = re.match(r"(\.L_x_\d+):", line)
            if label:
                label_at[label[1]] = number
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if branch and branch[1] in label_at:
                spans.append((label_at[branch[1]], number))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [self.lines[begin : end + 1] for begin, end in inner]

    def most_vector_loads_in_flight(self) -> int:
        """Over the loops: how many 16-byte loads come before the first use of what one of them brings."""
        return max((vector_loads_before_use(loop) for loop in self.loops()), default=0)

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)


def is_vector_load(line: str) -> bool:
    return re.search(r"\bLDG\.E\S*\.128", line) is not None


def vector_loads_before_use(instructions: list[str]) -> int:
    loaded: set[str] = set()
    count = 0
    for line in instructions:
        load = re.search(r"\bLDG\.E\S*\.128\S*\s+R(\d+),(.*)", line)
        operands = set(re.findall(r"\bR\d+\b", load[2] if load else line))
        if operands & loaded:
            return count
        if load:
            count += 1
            loaded |= {f"R{int(load[1]) + i}" for i in range(4)}
    return count


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    return next((found for found in map(shutil.which, filter(None, candidates)) if found), None)


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: beside nvcc, on the PATH, or in triton's package."""
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def compile_for(architecture: int, nvcc: str, instantiations: str = "instantiate.cu") -> Path:
    """The kernels as machine code of one architecture; compiled again only when a source or the compiler changes."""
    sources = [HERE / instantiations, *sorted((ROOT / "csrc").rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.cuh"))]
    digest = hashlib.sha256(run(nvcc, "--version").encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "cuda_resources"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(instantiations).stem}-sm_{architecture}"
    cubin = folder / f"{stem}-{digest.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        for stale in folder.glob(f"{stem}-*.cubin"):
            stale.unlink()
        unfinished = cubin.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", "-cubin"]
        run(nvcc, *flags, str(HERE / instantiations), "-o", str(unfinished))
        unfinished.rename(cubin)
    return cubin


def kernels_in(cubin: Path, cuobjdump: str, nvdisasm: str) -> list[Kernel]:
    listing: dict[str, list[str]] = {}
    current: list[str] = []
    for line in run(nvdisasm, "-c", str(cubin)).splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            current = listing.setdefault(section[1], [])
        current.append(line)
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run(cuobjdump, "-res-usage", str(cubin))
    )
    kernels = []
    for mangled, registers, stack, local in usage:
        parts = re.match(r"_ZN8biasloss\d+(\w+?_kernel)I(f|d|6__half|13__nv_bfloat16)", mangled)
        if parts is None:
            raise RuntimeError(f"cannot read the name of kernel {mangled}")
        name = parts[1]
        if name == "bias_loss_forward_kernel":
            name += ", one position" if "Lb1E" in mangled else ", many positions"
        size = re.search(r"Li(\d)ELi(\d)E", mangled)  # of a depthwise kernel
        if size is not None:
            name += f", {size[1]} by {size[1]}, stride {size[2]}"
        kernel = Kernel(name, DTYPES[parts[2]], int(registers), int(stack), int(local), listing[mangled])
        kernels.append(kernel)
    return kernels
