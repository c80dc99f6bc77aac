"""Average pooling to a given size, with a deterministic gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from biasloss_ext.ops.tracing import is_exporting


def average_to(x: Tensor, size: tuple[int, int], deterministic: bool | None = None) -> Tensor:
    """``F.adaptive_avg_pool2d(x, size)``, whose own CUDA backward pass uses atomic additions in any order.

    If the sizes divide, windows do not overlap, and `F.avg_pool2d` is the same function with a fixed order.

    Args:
        x: map (N, C, H, W) of any floating dtype, contiguous or channels_last (kept).
        size: height and width of the result.
        deterministic: use two small matrix products if the sizes do not divide; by default on CUDA after
            ``torch.use_deterministic_algorithms(True)``.
    """
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        return _by_products(x, *size)  # that exporter has no adaptive average to a size which may vary
    if not isinstance(x, Tensor) or torch.jit.is_tracing() or is_exporting():
        return F.adaptive_avg_pool2d(x, size)  # a graph must not depend on whether these sizes divide
    (height, width), (rows, columns) = x.shape[-2:], size
    if (height, width) == (rows, columns):
        return x
    if rows > 0 and columns > 0 and height % rows == 0 and width % columns == 0:
        return F.avg_pool2d(x, (height // rows, width // columns))
    if deterministic is None:
        deterministic = x.is_cuda and torch.are_deterministic_algorithms_enabled()
    return _by_products(x, rows, columns) if deterministic else F.adaptive_avg_pool2d(x, size)


def _by_products(x: Tensor, rows: int, columns: int) -> Tensor:
    """Average rows and columns by matrix products; in float32 for 16-bit maps, so that the result is rounded once."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    wide = x if x.dtype == torch.float64 else x.float()
    over_rows, over_columns = (
        _averages(*sizes, wide.dtype, x.device) for sizes in ((x.shape[-2], rows), (x.shape[-1], columns))
    )
    with torch.autocast(x.device.type, enabled=False):
        averaged = (over_rows @ (wide @ over_columns.T)).to(x.dtype)
    return averaged.contiguous(memory_format=torch.channels_last) if channels_last else averaged


def _averages(size: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (outputs, size) whose row i averages from floor(i * size / outputs) to ceil((i + 1) * size / outputs)."""
    index = torch.arange(outputs, device=device)[:, None]
    position = torch.arange(size, device=device)
    inside = (position >= index * size // outputs) & (position < ((index + 1) * size + outputs - 1) // outputs)
    window = inside.to(dtype)
    return window / window.sum(1, keepdim=True)
