"""Which backends tests can run here."""

from __future__ import annotations

import torch

import biasloss_ext  # noqa: F401  (declares the ops)
from biasloss_ext.ops import backends


def backends_of(op: str) -> tuple[str, ...]:
    """Those of an op that run on CPU tensors in this process, the reference last: compiled kernels; on a simulated GPU
    those for CUDA, and Triton's under its interpreter."""
    cpu = torch.device("cpu")
    kernels = (name for name in backends.BACKENDS_OF[op] if name != "reference")
    return (*(name for name in kernels if backends.why_not(name, cpu, op) is None), "reference")
