"""Statistics and options of `nn.BatchNorm2d` modules, for layers that apply them in their own kernels.

`biasloss_ext.ops.maps` defines moments, statistics and affine. They have the accumulation dtype, float32 or float64,
regardless of the dtype of the module's parameters and statistics. Nothing here causes a GPU sync.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn import synchronized
from biasloss_ext.nn.members import buffer
from biasloss_ext.nn.synchronized import Synchronization
from biasloss_ext.ops.batch_norm import op


class Running(NamedTuple):
    """The running statistics that an op updates while it computes the statistics of a batch."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float


class Norm(NamedTuple):
    """One batch normalization, as the layers' autograd functions take it.

    Attributes:
        eps: of the module.
        frozen: whether it normalizes by constants rather than by the statistics of the batch.
        running: the statistics that the op updates; None if nothing changes, or if `update_running` does it.
        sync: the processes that share their statistics; None for this process only.
    """

    eps: float
    frozen: bool = False
    running: Running | None = None
    sync: Synchronization | None = None

    def finish(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
        """The arguments by which an op finishes the statistics of the map that it writes."""
        arguments: dict[str, Any] = {"norm_weight": weight, "norm_bias": bias, "eps": self.eps}
        if self.running is not None:
            mean, var, tracked, momentum = self.running
            arguments.update(running_mean=mean, running_var=var, num_batches_tracked=tracked, momentum=momentum)
        return arguments

    @property
    def is_returned(self) -> bool:
        """Whether the caller updates the running statistics."""
        return not self.frozen and self.running is None

    @property
    def back(self) -> dict[str, Any]:
        """The arguments by which a backward op finishes the coefficients."""
        return {"eps": self.eps, "frozen": self.frozen}


NONE = Norm(0.0, True)  # for a step without a normalization


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the module normalizes by the moments of the batch: in training, or if it keeps no running statistics."""
    if not isinstance(module, _BatchNorm):
        return False
    return module.training or (module.running_mean is None and module.running_var is None)


def norm_of(module: nn.Module | None, dtype: torch.dtype, count: int, *, moves: bool = True) -> Norm:
    """The normalization of a map with ``count`` values per channel by a module, in the accumulation dtype ``dtype``.

    Args:
        module: a batch normalization, or a normalization by constants; None for no normalization.
        moves: whether an op may update the running statistics.

    Raises:
        ValueError: the batch has one value per channel, and its statistics are needed.
    """
    if module is None:
        return NONE
    if not uses_batch_statistics(module):
        return Norm(module.eps, True)  # type: ignore[arg-type]
    assert isinstance(module, _BatchNorm)
    sync = synchronized.of_module(module) if module.training else None
    if sync is not None:
        return Norm(module.eps, sync=sync)
    if count == 1:
        shape = (1, module.num_features, 1, 1)
        raise ValueError(f"expected more than 1 value per channel when training, got input of shape {shape}")
    mean, var, momentum = buffer(module, "running_mean"), buffer(module, "running_var"), module.momentum
    if (
        not moves
        or mean is None
        or var is None
        or momentum is None
        or not module.training
        or not module.track_running_stats
        or mean.dtype is not dtype
        or var.dtype is not dtype
        or torch.compiler.is_compiling()  # a compiler fuses the update itself
    ):
        return Norm(module.eps)
    return Norm(module.eps, False, Running(mean, var, buffer(module, "num_batches_tracked"), momentum))


def constant_statistics(
    module: nn.Module, dtype: torch.dtype, *, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Statistics (4, C) of a module that normalizes by its running statistics.

    Args:
        bias: the bias of the convolution before it.

    Raises:
        ValueError: the module keeps no running statistics.
    """
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        raise ValueError(
            "expected a batch normalization with running statistics, got one with track_running_stats=False"
        )
    with torch.no_grad():
        if bias is not None:
            mean = mean - bias  # type: ignore[operator]
        moments = torch.stack((mean, var)).to(dtype)  # type: ignore[arg-type, list-item]
        weight, shift = in_dtype(module.weight, dtype), in_dtype(module.bias, dtype)  # type: ignore[arg-type]
        run: dict[str, Any] = {"norm_weight": weight, "norm_bias": shift, "eps": module.eps, "backend": backend}
        statistics: Tensor = op.affine(moments, 0, **run)
    return statistics


def in_dtype(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The values as a contiguous tensor of ``dtype``, without a copy if they are one already."""
    if values is None or (values.dtype is dtype and values.is_contiguous()):
        return values
    return values.to(dtype).contiguous()


def _move_towards(running: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    """running = (1 - momentum) * running + momentum * value, rounded once to the dtype of ``running``."""
    if running.dtype == value.dtype:
        running.lerp_(value, momentum)
    else:
        running.copy_(torch.lerp(running.to(value.dtype), value, momentum))


def update_running(module: nn.Module, statistics: Tensor, count: int | Tensor) -> None:
    """Update the module's running statistics as `nn.BatchNorm2d` does in training, if no op does it.

    The statistics keep their dtype and use the unbiased variance. Nothing changes in evaluation or without running statistics.

    Args:
        module: the module whose statistics change.
        statistics: those of the batch; the first two rows are mean and biased variance.
        count: the number of values per channel, N * H * W. An empty batch is counted but does not change the statistics.
    """
    if not (isinstance(module, _BatchNorm) and module.training and module.track_running_stats):
        return
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None or (isinstance(count, int) and count == 0):
        return
    momentum: float | Tensor
    if module.momentum is not None:
        momentum = module.momentum
    else:  # the average over all batches so far
        assert module.num_batches_tracked is not None
        momentum = module.num_batches_tracked.to(statistics.dtype).reciprocal()
    batch_mean, batch_var = statistics.detach()[:2].unbind()
    _move_towards(mean, batch_mean, momentum)
    _move_towards(var, batch_var * (count / (count - 1)), momentum)
