"""The bookkeeping of `nn.BatchNorm2d` modules for blocks that apply them in their own kernels.

Moments, affine, sums and coefficients are those of :mod:`biasloss_ext.ops.maps`. They have the accumulation dtype, float32 or
float64, whatever the dtype of the module's parameters and statistics. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biasloss_ext.ops.batch_norm import op


def uses_batch_statistics(module: nn.BatchNorm2d) -> bool:
    """Whether the module normalises by the batch's own moments: in training, and where it keeps no running statistics."""
    return module.training or (module.running_mean is None and module.running_var is None)


def affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """Scale ``weight / sqrt(var + eps)`` and shift ``bias - scale * mean``, (2, C), dtype of moments.

    Args:
        moments: mean and biased variance, (2, C).
        weight: (C,) of any float dtype; None for ones.
        bias: (C,) of any float dtype; None for zeros.
        eps: added to the variance.
        backend: see :func:`biasloss_ext.functional.bias_loss`.
    """
    dtype = moments.dtype
    if weight is not None and weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    scale_and_shift: Tensor = op.affine(moments, weight, bias, eps, device=moments.device, backend=backend)
    return scale_and_shift


def running_moments(module: nn.BatchNorm2d, dtype: torch.dtype = torch.float32) -> Tensor:
    """The running statistics as moments, (2, C), of the given accumulation dtype."""
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        raise ValueError("expected a batch normalisation with running statistics, this one keeps none")
    moments = torch.stack((mean, var))
    return moments if moments.dtype == dtype else moments.to(dtype)


def running_affine(module: nn.BatchNorm2d, dtype: torch.dtype = torch.float32, *, backend: str = "auto") -> Tensor:
    """What the module does in evaluation, as an affine (2, C)."""
    return affine(running_moments(module, dtype), module.weight, module.bias, module.eps, backend=backend)


def _move_towards(running: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    """running = (1 - momentum) * running + momentum * value, rounded once to the dtype of ``running``."""
    if running.dtype == value.dtype:
        running.lerp_(value, momentum)
    else:
        running.copy_(torch.lerp(running.to(value.dtype), value, momentum))


def update_running(module: nn.BatchNorm2d, moments: Tensor, count: int) -> None:
    """Do to the module's running statistics what `nn.BatchNorm2d` does with a batch in training.

    The statistics keep their dtype, and take the unbiased variance. No-op in evaluation and without running statistics.

    Args:
        module: whose statistics move.
        moments: of the batch, (2, C).
        count: how many values a channel has, N * H * W. An empty batch is counted, and changes no statistics.

    Raises:
        ValueError: one value a channel, in training.
    """
    if count == 1:
        shape = (1, moments.shape[1], 1, 1)
        raise ValueError(f"expected more than 1 value per channel when training, got input of shape {shape}")
    if not (module.training and module.track_running_stats):
        return
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None or count == 0:
        return
    momentum: float | Tensor
    if module.momentum is not None:
        momentum = module.momentum
    else:  # the average over all batches so far
        assert module.num_batches_tracked is not None
        momentum = module.num_batches_tracked.to(moments.dtype).reciprocal()
    batch_mean, batch_var = moments.unbind()
    _move_towards(mean, batch_mean, momentum)
    _move_towards(var, batch_var * (count / (count - 1)), momentum)


def coefficients(
    sums: Tensor, affine: Tensor, moments: Tensor, eps: float, count: int, frozen: bool, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The backward pass of a batch normalisation from its two sums.

    Args:
        sums: ``sum(du)`` and ``sum(du * (y - mean))``, (2, C).
        affine: what was applied, (2, C).
        moments: what it was made of, (2, C): of the batch, or running statistics.
        eps: as for `affine`.
        count: how many values a channel has, N * H * W.
        frozen: whether the moments are running statistics, through which no gradient flows.
        backend: see :func:`biasloss_ext.functional.bias_loss`.

    Returns:
        coefficients (4, C), so that ``dy = a * du + b * (y - center) + c``, with center the mean;
        the gradients of weight and bias, (2, C).
    """
    arguments = (sums, affine, moments, eps, count, frozen)
    result: tuple[Tensor, Tensor] = op.coefficients(*arguments, device=sums.device, backend=backend)
    return result
