"""What setup.py builds for: the compilers, GPU architectures and instruction sets, by the environment and the machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import torch

OLDEST_CUDA = (12, 0)
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
X86_VARIANTS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
BYTES_PER_JOB = 3 << 30  # nvcc, while it compiles for all architectures

# What torch calls architectures in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHITECTURES = {
    "Turing": ("7.5+PTX",),
    "Ampere": ("8.0", "8.6+PTX"),
    "Ampere+Tegra": ("8.7",),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell+Tegra": ("11.0",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1+PTX"),
}


def say(text: str) -> None:
    print(f"biasloss_ext: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: tuple[int, int]
    architectures: tuple[str, ...]  # "9.0", "12.0+PTX"

    def flags(self) -> list[str]:
        flags = []
        for name in self.architectures:
            number = name.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if name.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def output_of(*command: str) -> str:
    """What a compiler says of itself; exits with one sentence where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        sys.exit(f"biasloss_ext: cannot run {command[0]}: {error.strerror}; set CXX or NVCC to a compiler that runs")
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()
        sys.exit(
            f"biasloss_ext: {shlex.join(command)} failed with exit code {error.returncode}"
            f"{f' ({said[-1]})' if said else ''}; set CXX or NVCC to a compiler that works, or BIASLOSS_CUDA=0 to build"
            " without CUDA kernels"
        )


def words(variable: str) -> list[str]:
    """The words of an environment variable, as a shell reads them."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        sys.exit(f"biasloss_ext: {variable} cannot be read ({error}), got {os.environ[variable]!r}")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def find_cuda(development: bool = False) -> Cuda | None:
    """The CUDA compiler to build with, or None; exits with one sentence where CUDA is asked for and cannot be had."""
    asked = os.environ.get("BIASLOSS_CUDA")
    if asked not in (None, "", "0", "1"):
        sys.exit(f"biasloss_ext: BIASLOSS_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        say("no CUDA kernels: BIASLOSS_CUDA=0")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if asked == "1":
            sys.exit("biasloss_ext: BIASLOSS_CUDA=1, but nvcc is not found: set CUDA_HOME, or NVCC to its path")
        say("no CUDA kernels: nvcc is not found (set CUDA_HOME to build them); Triton will serve GPUs")
        return None
    version = nvcc_version(nvcc)
    if version < OLDEST_CUDA:
        sys.exit(
            f"biasloss_ext: {nvcc} is CUDA {version[0]}.{version[1]}, but {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer is"
            " needed: set CUDA_HOME to a newer toolkit, or BIASLOSS_CUDA=0 to build without CUDA kernels"
        )
    check_against_torch(version)
    return Cuda(nvcc, version, architectures(nvcc, development))


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = output_of(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        sys.exit(f"biasloss_ext: {nvcc} --version prints no release: set NVCC to the CUDA compiler")
    return int(found[1]), int(found[2])


def check_against_torch(version: tuple[int, int]) -> None:
    if torch.version.cuda is None:
        return
    major, minor = (int(part) for part in torch.version.cuda.split(".")[:2])
    if major != version[0]:
        sys.exit(
            f"biasloss_ext: nvcc is CUDA {version[0]}.{version[1]}, torch {torch.__version__} is built for CUDA"
            f" {torch.version.cuda}: set CUDA_HOME to a CUDA {major} toolkit, or BIASLOSS_CUDA=0 to build without CUDA"
            " kernels; if this is not the torch you run, install with --no-build-isolation"
        )
    if minor != version[1]:
        say(
            f"warning: nvcc is CUDA {version[0]}.{version[1]}, torch is built for {torch.version.cuda};"
            " this should work"
        )


def architectures(nvcc: str, development: bool = False) -> tuple[str, ...]:
    """Those asked for; by default what is in use, or in a build for development those of the GPUs here, or the oldest with code
    that any newer GPU can compile for itself."""
    text = output_of(nvcc, "--list-gpu-arch")
    known = {f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", text)}
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if asked == ["native"] or (not asked and development and torch.cuda.is_available()):
        count = torch.cuda.device_count()
        asked = sorted({".".join(map(str, torch.cuda.get_device_capability(index))) for index in range(count)})
    if not asked or asked in (["common"], ["All"]):
        defaults = [name for name in DEFAULT_ARCHITECTURES if name in known]
        if not defaults:
            sys.exit(f"biasloss_ext: {nvcc} knows none of {', '.join(DEFAULT_ARCHITECTURES)}: set NVCC to another one")
        defaults = defaults[:1] if development else defaults
        return (*defaults[:-1], f"{defaults[-1]}+PTX")
    names = [name for entry in asked for name in NAMED_ARCHITECTURES.get(entry, (entry,))]
    for name in names:
        # The letters of 9.0a and 10.0f let a compiler use what later architectures lack.
        if re.sub(r"[af]?(\+PTX)?$", "", name) not in known:
            sys.exit(
                f"biasloss_ext: TORCH_CUDA_ARCH_LIST asks for {name!r},"
                f" {nvcc} knows {', '.join(sorted(known, key=float))}, and the names"
                f" {', '.join(NAMED_ARCHITECTURES)}"
            )
    return tuple(dict.fromkeys(names))


def cpu_variants(development: bool) -> dict[str, list[str]]:
    """The instruction sets to compile the CPU kernels for, with the compiler's flags: all, or in a build for development the
    portable one and the best of this machine."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": []}
    asked = os.environ.get("BIASLOSS_CPU_VARIANTS", "native" if development else "all")
    if asked not in ("all", "native"):
        sys.exit(f"biasloss_ext: BIASLOSS_CPU_VARIANTS must be all or native, got {asked!r}")
    variants = {"baseline": [], **X86_VARIANTS}
    if asked == "native":
        capability = torch.backends.cpu.get_cpu_capability().lower()
        best = next((name for name in ("avx512", "avx2") if capability.startswith(name)), "baseline")
        variants = {name: flags for name, flags in variants.items() if name in ("baseline", best)}
    return variants


def int8_variants(variants: Container[str]) -> dict[str, list[str]]:
    """The instruction sets to compile the kernels on bytes for. There are few, so a build for development has every one that its
    machine can run, and tests it."""
    found = {}
    if "avx2" in variants or "avx512" in variants:
        found["avx2"] = X86_VARIANTS["avx2"]
    if "avx512" in variants:
        found["avx512vnni"] = [*X86_VARIANTS["avx512"], "-mavx512vnni"]
    return found


def jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "").strip()
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            sys.exit(f"biasloss_ext: MAX_JOBS must be a number from 1 on, got {asked!r}")
        return int(asked)
    return max(1, min(len(os.sched_getaffinity(0)), available_memory() // BYTES_PER_JOB))


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that programs can get. Free pages alone leave out the cache of files, which is large after torch is installed."""
    found = re.search(r"^MemAvailable: *(\d+) kB$", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
