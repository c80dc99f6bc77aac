"""How a run is computed, which changes nothing of what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunOptions:
    """Options of a training run that are no part of its recipe.

    Attributes:
        device: "auto", "cpu" or "cuda".
        workers: processes that read images from files.
        checkpoint_steps: a checkpoint after so many steps too, not only after every epoch; 0 for none.
        fresh: start over, whatever the folder of the run holds.
        skip_broken: image files that cannot be read are left out.
        cuda_graphs: captures the steps in a CUDA graph; where that is impossible, says why and runs them eagerly.
    """

    device: str = "auto"
    workers: int = 0
    checkpoint_steps: int = 0
    fresh: bool = False
    skip_broken: bool = False
    cuda_graphs: bool = False

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those of ``options`` that are fields of this class, and the others."""
        own = {field.name for field in dataclasses.fields(cls)}
        return (
            {name: value for name, value in options.items() if name in own},
            {name: value for name, value in options.items() if name not in own},
        )
