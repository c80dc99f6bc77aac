"""Loads the compiled kernels once, and remembers why when they cannot be had."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

# The path of an op library whose CUDA kernels run on the CPU, for tests: CPU tensors then stand for a GPU's.
SIMULATED_GPU = os.environ.get("BIASLOSS_SIMULATED_GPU")
BUILD_HINT = "reinstall with `pip install --no-build-isolation .` next to the torch you run"


@dataclass(frozen=True)
class Native:
    """What the installed package carries. ``problem`` is None when the kernels are loaded."""

    problem: str | None
    cuda_architectures: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)


def simulated() -> bool:
    """Whether CPU tensors stand for a GPU's."""
    return SIMULATED_GPU is not None


@functools.cache
def native() -> Native:
    """Load ``_ops.so``, or the simulated GPU's library in its place, and ``_C``; never raises."""
    path = Path(__file__).parent.parent / "_ops.so" if SIMULATED_GPU is None else Path(SIMULATED_GPU)
    if not path.exists():
        if simulated():
            return Native(f"BIASLOSS_SIMULATED_GPU names {path}, which does not exist; build it, or unset the variable")
        return Native(f"the compiled kernels are not built; {BUILD_HINT}")
    try:
        torch.ops.load_library(path)
        module = importlib.import_module("biasloss_ext._C")
    except (OSError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return Native(f"the compiled kernels do not load under torch {torch.__version__} ({reason}); {BUILD_HINT}")
    build = dict(module.build_information())
    architectures = tuple(name for name in build.get("cuda_architectures", "").split(";") if name)
    return Native(None, architectures, build)


def warn_if_missing() -> None:
    """One warning an import: everything still works, on the reference backend."""
    problem = native().problem
    if problem is not None:
        warnings.warn(f"biasloss_ext falls back to plain PyTorch: {problem}", RuntimeWarning, stacklevel=3)


def covers(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` ("8.0", "9.0+PTX") runs on a GPU of this compute capability.

    Machine code runs on the same major version from its minor version on; PTX on everything from its version on.
    """
    for name in architectures:
        major, minor = (int(part) for part in name.removesuffix("+PTX").split("."))
        if name.endswith("+PTX") and (major, minor) <= capability:
            return True
        if major == capability[0] and minor <= capability[1]:
            return True
    return False
