"""What every stage of the GPU suite is given, and how it leaves its results."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from biasloss_ext.ops import native


@dataclass(frozen=True)
class Arguments:
    """Of a stage.

    Attributes:
        device: the GPU, or the CPU that stands for one.
        tiny: shapes that run the code and say nothing about speed.
        limit: seconds after which a stage that measures begins nothing new.
        out: file for its results, in JSON.
    """

    device: torch.device
    tiny: bool
    limit: float
    out: Path

    def save(self, results: Any) -> None:
        """What is there so far; a stage that is broken off leaves it."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(partial, self.out)


def parser(description: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu needs the simulated GPU")
    found.add_argument("--tiny", action="store_true", help="shapes that say nothing about speed")
    found.add_argument("--limit", type=float, default=60.0, help="seconds")
    found.add_argument("--out", type=Path, default=Path("results.json"))
    return found


def parsed(from_parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> tuple[Arguments, Any]:
    """(what every stage has, everything)."""
    found = from_parser.parse_args(given)
    if found.device == "cuda" and not torch.cuda.is_available():
        from_parser.exit(2, "--device cuda: torch finds no GPU here; --device cpu runs on the simulated one\n")
    if found.device == "cpu" and not native.simulated():
        from_parser.exit(2, "--device cpu needs the simulated GPU: set BIASLOSS_SIMULATED_GPU and TRITON_INTERPRET=1\n")
    return Arguments(torch.device(found.device), found.tiny, found.limit, found.out), found
