"""The same under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MODES = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune"}


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """``function`` compiled for fixed shapes. The engine raises Dynamo's limit of variants a function."""
    return torch.compile(function, mode=mode, dynamic=False)
