"""Compares what a kernel returns with its reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.calls import WRITTEN, Call

# What a rounding to the dtype costs, relative. The interpreter cuts bfloat16 off where a GPU rounds to nearest.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-24, torch.float64: 2**-51}


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_matches(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any] | None = None,
    roundings: float = 5,
) -> tuple[Tensor, ...]:
    """Every output to within twice the float32 reference's own error, or ``roundings`` of the maps' dtype, relative to the
    largest element: factors of products are rounded to that dtype, a result once more. Shapes, dtypes, layout are the
    reference's, too. What the kernel writes among its ``options`` is compared like an output."""
    call = Call(arguments, options or {})
    runs = [(kernel, call), (reference, call.to(torch.float64)), (reference, call)]
    outputs, exact, own = (_outcome(function, each.fresh()) for function, each in runs)
    given = [a for a in arguments if isinstance(a, Tensor)]
    dtype = next((a.dtype for a in given if a.dim() == 4), given[0].dtype)  # of the maps, where there are any
    for output, expected, torchs in zip(outputs, exact, own, strict=True):
        assert output.shape == torchs.shape and output.dtype == torchs.dtype
        assert output.dim() != 4 or output.stride() == torchs.stride() or 1 in output.shape
        if output.numel() == 0:
            continue
        error, error_of_torch = ((t.double() - expected).abs().max().item() for t in (output, torchs))
        scale = expected.abs().max().item()
        bound = 2 * (error_of_torch if dtype in (torch.float32, torch.float64) else 0.0)
        assert error <= bound + roundings * ROUNDING[dtype] * scale, (error, error_of_torch, scale)
    return outputs


def _outcome(function: Callable[..., Any], call: Call) -> tuple[Tensor, ...]:
    """The outputs, and the floating-point tensors that the function wrote."""
    outputs = tensors(call(function))
    written = (call.options.get(name) for name in WRITTEN)
    return *outputs, *(t for t in written if isinstance(t, Tensor) and t.is_floating_point())


def random_map(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.5, std: float = 2.0) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64) * std + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
