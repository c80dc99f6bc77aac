"""Checks of the arguments of public functions. Each error says what was given and what is expected."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's own reduction codes
NORMALISATION_MODES = ("global", "local")
CLASS_DTYPES = (torch.int64, torch.int32, torch.uint8)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEPTHWISE_KERNELS = (3, 5, 7)
DEPTHWISE_STRIDES = (1, 2)

targets_are_checked = False


def check_targets(enabled: bool) -> None:
    """Turn a check of class targets on or off, for all Bias Losses of the process.

    By default, a class out of range makes the loss of its sample NaN on a GPU, at no cost. With this check it raises an
    IndexError that names the sample, the value and the number of classes, but the check forces a GPU sync every step. On a CPU
    the error is always raised.

    Args:
        enabled: whether to check.
    """
    global targets_are_checked
    targets_are_checked = bool(enabled)


def hyperparameters(
    alpha: float,
    beta: float,
    label_smoothing: float = 0.0,
    normalisation_mode: str = "global",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> None:
    given = (alpha, beta, label_smoothing, normalisation_mode, reduction, ignore_index)
    for (name, check), value in zip(_HYPERPARAMETERS.items(), given, strict=True):
        check(name, value)


def hyperparameter(name: str, value: Any) -> Any:
    """A hyperparameter, checked and converted for the ops; a value of another name unchanged."""
    return _HYPERPARAMETERS[name](name, value) if name in _HYPERPARAMETERS else value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _alpha(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number < float("inf"):
        raise ValueError(f"alpha must be finite and at least 0, got {value}")
    return number


def _beta(name: str, value: Any) -> float:
    number = _number(name, value)
    if not -float("inf") < number < 1.0:
        raise ValueError(f"beta must be finite and below 1, got {value}")
    return number


def _label_smoothing(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {value}")
    return number


def _normalisation_mode(name: str, value: Any) -> str:
    if value not in NORMALISATION_MODES:
        raise ValueError(f"normalisation_mode must be one of {NORMALISATION_MODES}, got {value!r}")
    return str(value)


def _reduction(name: str, value: Any) -> str:
    if value not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {value!r}")
    return str(value)


def _ignore_index(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"ignore_index must be an integer, got {type(value).__name__}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, got {number}")
    return number


_HYPERPARAMETERS: dict[str, Callable[[str, Any], Any]] = {
    "alpha": _alpha,
    "beta": _beta,
    "label_smoothing": _label_smoothing,
    "normalisation_mode": _normalisation_mode,
    "reduction": _reduction,
    "ignore_index": _ignore_index,
}


def running_min(running_min: Tensor | None) -> None:
    if running_min is None:
        return
    if not isinstance(running_min, Tensor):
        raise TypeError(f"running_min must be a tensor without dimensions, got {type(running_min).__name__}")
    if running_min.dim() != 0:
        raise ValueError(f"running_min must be a tensor without dimensions, got shape {tuple(running_min.shape)}")
    floating("running_min", running_min)


def features(features: Tensor) -> None:
    floating("features", features)
    if features.dim() < 1:
        raise ValueError("features must have shape (N, *), got a tensor without dimensions")
    if 0 in features.shape[1:]:
        raise ValueError(f"features must have at least one activation per sample, got shape {tuple(features.shape)}")


def variance(variance: Tensor) -> None:
    floating("variance", variance)
    if variance.dim() != 1:
        raise ValueError(f"variance must have shape (N,), got {tuple(variance.shape)}")


def tensors(
    given_features: Tensor | None,
    given_variance: Tensor | None,
    output: Tensor,
    target: Tensor,
    weight: Tensor | None,
) -> None:
    floating("output", output)
    if output.dim() < 2 or output.shape[1] < 1:
        raise ValueError(f"output must have shape (N, K, *d) with K >= 1, got {tuple(output.shape)}")
    _target(output, target)
    if weight is not None:
        floating("weight", weight)
        if weight.shape != (output.shape[1],):
            raise ValueError(f"weight must have shape ({output.shape[1]},), one per class, got {tuple(weight.shape)}")
        _same_device("weight", weight, output)
    if given_features is not None and given_variance is not None:
        raise ValueError("give either features or variance=, not both")
    if given_features is not None:
        features(given_features)
        _same_batch("features", given_features, output)
    elif given_variance is not None:
        variance(given_variance)
        _same_batch("variance", given_variance, output)
    else:
        raise ValueError("features is None: give the features, or their variance as variance=")


def _target(output: Tensor, target: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    _same_device("target", target, output)
    if target.is_floating_point():
        if target.shape != output.shape:
            raise ValueError(
                f"probability targets must have the shape of output, {tuple(output.shape)}, got {tuple(target.shape)}"
            )
        return
    if target.dtype not in CLASS_DTYPES:
        raise TypeError(f"class targets must be int64, int32 or uint8, got {target.dtype}")
    expected = (output.shape[0], *output.shape[2:])
    if target.shape != expected:
        raise ValueError(
            f"class targets must have shape {expected} for output of shape {tuple(output.shape)}, "
            f"got {tuple(target.shape)}"
        )


def probabilities(target: Tensor, ignore_index: int) -> None:
    """Check the options that probability targets exclude."""
    if target.is_floating_point() and ignore_index >= 0:
        raise ValueError(
            f"ignore_index applies only to class targets, got ignore_index={ignore_index} with probability targets: "
            "leave it at -100"
        )


def classes_in_range(output: Tensor, target: Tensor, ignore_index: int) -> None:
    if target.is_floating_point():
        return
    classes = target.long()
    wrong = ((classes < 0) | (classes >= output.shape[1])) & (classes != ignore_index)
    if bool(wrong.any()):
        first = wrong.nonzero()[0]
        value = int(classes[tuple(first)])
        raise IndexError(f"target of sample {int(first[0])} is {value}, expected a class in [0, {output.shape[1]})")


def depthwise_stride(stride: Any) -> int:
    """The stride as one number."""
    pair = tuple(stride) if isinstance(stride, (tuple, list)) else (stride, stride)
    if any(isinstance(value, bool) or not isinstance(value, numbers.Integral) for value in pair):
        raise TypeError(f"stride must be an integer or a pair of integers, got {stride!r}")
    if len(pair) not in (1, 2) or pair[0] != pair[-1] or pair[0] not in DEPTHWISE_STRIDES:
        raise ValueError(f"stride must be one of {DEPTHWISE_STRIDES} in both directions, got {stride!r}")
    return int(pair[0])


def depthwise_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    floating("x", x)
    floating("weight", weight)
    if bias is not None:
        floating("bias", bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be (N, C, H, W) or (C, H, W), got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"weight must be (C, 1, k, k), got {tuple(weight.shape)}")
    height, width = weight.shape[2:]
    if height != width or height not in DEPTHWISE_KERNELS:
        raise ValueError(
            f"kernel_size must be one of {DEPTHWISE_KERNELS} in both directions, got {tuple(weight.shape[2:])}"
        )
    channels = weight.shape[0]
    if x.shape[-3] != channels:
        raise ValueError(f"x has {x.shape[-3]} channels, weight has {channels}")
    if x.shape[-2] < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have a height and a width of at least 1, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be ({channels},), got {tuple(bias.shape)}")


def depthwise_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """Check that the dtypes are equal or, under autocast, that all or none are float64."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == x.dtype:
            continue
        if not autocast or torch.float64 in (tensor.dtype, x.dtype):
            raise TypeError(f"x is {x.dtype}, {name} is {tensor.dtype}: convert one of them, or use torch.autocast")


def floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _same_device(name: str, tensor: Tensor, output: Tensor) -> None:
    if tensor.device != output.device:
        raise ValueError(f"{name} is on {tensor.device}, output on {output.device}: move them to one device")


def _same_batch(name: str, tensor: Tensor, output: Tensor) -> None:
    if tensor.shape[0] != output.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} samples, output has {output.shape[0]}")
    _same_device(name, tensor, output)
