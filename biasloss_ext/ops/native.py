"""Loads the compiled kernels once, and remembers why when they cannot be had."""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

BUILD_HINT = "reinstall with `pip install --no-build-isolation .` next to the torch you run"


@dataclass(frozen=True)
class Native:
    """What the installed package carries. ``problem`` is None when the kernels are loaded."""

    problem: str | None
    cuda_architectures: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)


@functools.cache
def native() -> Native:
    """Load ``_ops.so`` and ``_C``.

    Raises:
        ValueError: the environment variable BIASLOSS_CPU_ISA is set, and names no instruction set.
    """
    path = Path(__file__).parent.parent / "_ops.so"
    if not path.exists():
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
