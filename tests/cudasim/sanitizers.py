"""Processes with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def runtime(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ comes without {name}")
    return path


def environment() -> dict[str, str]:
    return {
        **os.environ,
        # libstdc++ beside it: otherwise the sanitizer looks for the function that throws before it is loaded.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python never frees some of its objects; fibers move between stacks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Every array is an allocation of its own, with red zones around it.
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment(), **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
