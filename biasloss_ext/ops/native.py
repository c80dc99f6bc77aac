"""Loads the compiled kernels once, and records the reason if they do not load."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

# The path of an op library whose CUDA kernels run on the CPU, for tests: CPU tensors then stand in for a GPU's.
SIMULATED_GPU = os.environ.get("BIASLOSS_SIMULATED_GPU") or None
BUILD_HINT = "reinstall with `pip install --no-build-isolation .` in the environment of the torch you run"


@dataclass(frozen=True)
class Native:
    """The compiled kernels of the installed package. ``problem`` is None if they are loaded."""

    problem: str | None
    cuda_architectures: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)


def simulated() -> bool:
    """Whether CPU tensors stand in for a GPU's."""
    return SIMULATED_GPU is not None


@functools.cache
def native() -> Native:
    """Load ``_ops.so``, or the library of the simulated GPU instead.

    Raises:
        ValueError: the environment variable BIASLOSS_CPU_ISA is set to an unknown instruction set.
    """
    path = Path(__file__).parent.parent / "_ops.so" if SIMULATED_GPU is None else Path(SIMULATED_GPU)
    if not path.exists():
        if simulated():
            return Native(f"BIASLOSS_SIMULATED_GPU names {path}, which does not exist; build it, or unset the variable")
        return Native(f"the compiled kernels are not built; {_remedy(path.parent)}")
    try:
        torch.ops.load_library(path)
        build = _build_facts(path)
    except (OSError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return Native(
            f"the compiled kernels do not load under torch {torch.__version__} ({reason}); {_remedy(path.parent)}"
        )
    architectures = tuple(name for name in build.get("cuda_architectures", "").split(";") if name)
    return Native(None, architectures, build)


def _build_facts(path: Path) -> dict[str, str]:
    """What ``csrc/build_facts.cpp`` says of a library that is loaded."""
    function = ctypes.CDLL(str(path)).biasloss_build_facts
    function.restype = ctypes.c_char_p
    facts = dict(line.split("=", 1) for line in function().decode().splitlines())
    if "invalid" in facts:
        raise ValueError(facts["invalid"])
    return facts


def _remedy(package: Path) -> str:
    """The advice if ``package`` has no kernels that load."""
    others = (Path(entry or ".").resolve() / package.name for entry in sys.path)
    installed = next((other for other in others if other != package.resolve() and (other / "_ops.so").exists()), None)
    if installed is None:
        return BUILD_HINT
    return f"{package} hides the package installed in {installed}: run from another folder than {package.parent}"


def warn_if_missing() -> None:
    """Warn once per import. Everything still works, on the reference backend."""
    problem = native().problem
    if problem is not None:
        warnings.warn(f"biasloss_ext falls back to plain PyTorch: {problem}", RuntimeWarning, stacklevel=3)


def covers(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` ("8.0", "9.0+PTX", "9.0a", "10.0f") runs on a GPU of this compute capability.

    Machine code runs on the same major version from its minor version on; PTX on everything from its version on. Code for
    9.0a runs on 9.0 alone, code for 10.0f on its major version alone, also as PTX.
    """
    for name in architectures:
        number = name.removesuffix("+PTX")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        everything_newer = name.endswith("+PTX") and number[-1].isdecimal()
        family = major == capability[0] and minor <= capability[1] and not number.endswith("a")
        if (major, minor) == capability or family or (everything_newer and (major, minor) <= capability):
            return True
    return False
