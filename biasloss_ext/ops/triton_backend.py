"""Registers the Triton implementations of the ops. Triton itself is imported by their first call: it takes a while."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from biasloss_ext.ops.library import LIBRARY

_BLOCK_OPS = {
    "batch_norm": ("batch_norm_moments", "batch_norm_apply", "batch_norm_sums", "batch_norm_backward"),
    "pointwise": ("pointwise", "pointwise_backward"),
    "pool_variance": ("pool_variance", "pool_variance_backward"),
    "squeeze_excite": ("squeeze_excite", "squeeze_excite_backward"),
}
IMPLEMENTATIONS = {
    "feature_variance_triton": ("biasloss_ext.ops.feature_variance.triton", "feature_variance"),
    "bias_loss_triton": ("biasloss_ext.ops.bias_loss.triton", "bias_loss"),
    "bias_loss_backward_triton": ("biasloss_ext.ops.bias_loss.triton", "bias_loss_backward"),
    **{f"{op}_triton": (f"biasloss_ext.ops.{family}.triton", op) for family, ops in _BLOCK_OPS.items() for op in ops},
}


def _imported_by_first_call(module: str, function: str) -> Callable[..., Any]:
    implementation: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            implementation = getattr(importlib.import_module(module), function)
        return implementation(*arguments)

    return call


@functools.cache
def register() -> None:
    """To be called after the ops are defined. On CPU tensors the kernels run under Triton's interpreter alone."""
    keys = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",)
    for name, (module, function) in IMPLEMENTATIONS.items():
        for key in keys:
            LIBRARY.impl(name, _imported_by_first_call(module, function), key)
