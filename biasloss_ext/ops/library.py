"""The torch library ``biasloss_ext``: schemas live here, in Python, so that they exist without the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("biasloss_ext", "DEF")


def define(name: str, signature: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define ``biasloss_ext::name`` with its shape function, and return its overload."""
    LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"biasloss_ext::{name}", fake, lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.biasloss_ext, name).default
    return overload


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
