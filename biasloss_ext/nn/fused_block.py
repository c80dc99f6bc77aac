"""Runs a depthwise-separable block that is written in plain modules through the fused ops, where they can serve it."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.activations import ACTIVATIONS as ACTIVATIONS
from biasloss_ext.nn.block_function import Block, Options, Weights
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d
from biasloss_ext.nn.members import parameter
from biasloss_ext.ops import maps
from biasloss_ext.ops.backends import choose
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.tracing import exporting

Fused = Literal["auto", True, False]
KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)
EXACT_LAYERS = (nn.Conv2d, nn.Linear, DepthwiseConv2d)


class Gate(NamedTuple):
    """A squeeze-and-excitation: two linear or 1x1 convolution layers with biases, activations as in `ops.maps`."""

    reduce: nn.Linear | nn.Conv2d
    excite: nn.Linear | nn.Conv2d
    activation: int
    gate_activation: int


class Parts(NamedTuple):
    """The modules of a block, whatever they are called in it. `expand` is None for blocks that begin with the depthwise
    convolution."""

    expand: nn.Conv2d | None
    expand_norm: nn.BatchNorm2d | None
    expand_activation: int
    depthwise: nn.Conv2d
    depthwise_norm: nn.BatchNorm2d
    depthwise_activation: int
    gate: Gate | None
    project: nn.Conv2d
    project_norm: nn.BatchNorm2d
    others: tuple[nn.Module, ...] = ()  # the modules that the numbers of the activations stand for


def why_not_fusable(parts: Parts) -> str | None:
    """Return the reason why a block has no fused kernels, or None."""
    convolution = parts.depthwise
    kernel, channels = convolution.kernel_size, convolution.in_channels
    if kernel[0] != kernel[1] or kernel[0] not in KERNEL_SIZES:
        return f"the kernel is {kernel[0]} x {kernel[1]}, there are {', '.join(f'{k} x {k}' for k in KERNEL_SIZES)}"
    if convolution.stride[0] != convolution.stride[1] or convolution.stride[0] not in STRIDES:
        return f"the stride is {convolution.stride}, there are 1 and 2"
    if convolution.groups != channels or convolution.out_channels != channels:
        return f"{channels} channels in {convolution.groups} groups to {convolution.out_channels}, not depthwise"
    if convolution.dilation != (1, 1) or convolution.padding not in ((kernel[0] // 2,) * 2, kernel[0] // 2):
        return (
            f"the padding is {convolution.padding} and the dilation {convolution.dilation}, not those of the same size"
        )
    for name, plain in (("expand", parts.expand), ("project", parts.project)):
        if plain is not None and (plain.kernel_size != (1, 1) or plain.stride != (1, 1) or plain.groups != 1):
            return f"the {name} step is not a 1 x 1 convolution"
        if plain is not None and plain.padding not in ((0, 0), "valid", "same"):
            return f"the {name} step pads by {plain.padding}"
    for module in (parts.expand, convolution, parts.project):
        if module is not None and (parameter(module, "bias") is not None or module.padding_mode != "zeros"):
            return "a convolution has a bias or pads with other than zeros"
    norms = (parts.expand_norm, parts.depthwise_norm, parts.project_norm)
    for norm in norms:
        if isinstance(norm, nn.SyncBatchNorm):
            return "SyncBatchNorm takes its statistics over all processes"
        if norm is not None and not isinstance(norm, nn.BatchNorm2d):
            return f"{type(norm).__name__} is not BatchNorm2d"
    return _why_not_bypassed(parts)


def _why_not_bypassed(parts: Parts) -> str | None:
    """Why a module of the block must be called, rather than only its parameters read; None where none must."""
    gate = () if parts.gate is None else (parts.gate.reduce, parts.gate.excite)
    convolutions = (parts.expand, parts.depthwise, parts.project)
    for module in (*convolutions, *gate):
        if module is not None and type(module) not in EXACT_LAYERS:
            return f"{type(module).__name__} may compute something else than its base class"
    norms = (parts.expand_norm, parts.depthwise_norm, parts.project_norm)
    for module in (*convolutions, *gate, *norms, *parts.others):
        if module is not None and is_watched(module):
            return f"a {type(module).__name__} has hooks or a forward method of its own"
    return None


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class does: it has hooks (pruning and old weight normalization are hooks
    too), or a forward method of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_not_here(x: Tensor) -> str | None:
    """Why the fused ops cannot serve this input, or do not pay; None where they can."""
    if x.dim() != 4:
        return f"the input must be a map of shape (N, C, H, W), got {tuple(x.shape)}"
    if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return f"the input is {x.dtype}"
    return _why_no_kernels(x.device)


@functools.cache
def _why_no_kernels(device: torch.device) -> str | None:
    missing = [op for op in ("depthwise", "pointwise", "batch_norm_apply") if choose("auto", device, op) == "reference"]
    return f"no kernels of {', '.join(missing)} can run on {device}" if missing else None


_why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes_fused_path(x: Tensor, fused: Fused, objection: str | None, name: str) -> bool:
    """Whether the fused ops are to serve ``x``: not where a hook on all modules waits for the calls of the layers.

    Args:
        fused: "auto", True or False, as the layer was given it.
        objection: what `why_not_fusable` said of the layer.
        name: of the layer, for the message.

    Raises:
        RuntimeError: ``fused`` is True, and no kernels can run on ``x``; the message has the reason.
    """
    if fused is False or objection is not None or exporting(x) or _has_any_global_hook():
        return False
    reason = why_not_here(x)
    if reason is not None and fused is True:
        raise RuntimeError(f"{name}(fused=True) cannot run here: {reason}; fused='auto' takes the plain layers instead")
    return reason is None


def expand_free(x: Tensor, backend: str) -> bool:
    """Whether the expanded map is recomputed rather than stored."""
    return choose(backend, x.device, "expand_depthwise") != "reference"


def _parameters_of(norm: nn.BatchNorm2d | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (parameter(norm, "weight"), parameter(norm, "bias"))


def matrices_of(gate: Gate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias of both layers, a 1x1 convolution's weight as the matrix that it is."""
    reduce, excite = gate.reduce, gate.excite
    assert reduce.bias is not None and excite.bias is not None
    return reduce.weight.flatten(1), reduce.bias, excite.weight.flatten(1), excite.bias


def weights_of(parts: Parts) -> Weights:
    """The parameters of a block, the ones of the modules themselves."""
    gate = parts.gate
    in_order = (
        None if parts.expand is None else parameter(parts.expand, "weight"),
        *_parameters_of(parts.expand_norm),
        parameter(parts.depthwise, "weight"),
        *_parameters_of(parts.depthwise_norm),
        *(
            (None,) * 4
            if gate is None
            else (parameter(layer, name) for layer in (gate.reduce, gate.excite) for name in ("weight", "bias"))
        ),
        parameter(parts.project, "weight"),
        *_parameters_of(parts.project_norm),
    )
    return Weights._make(in_order)


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype in which autocast would have a convolution compute, channels_last. Autocast leaves float64 alone."""
    if x.dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return maps.channels_last(x)


def check_channels(x: Tensor, convolution: nn.Conv2d) -> None:
    """Raise where x has other channels than the convolution takes: a kernel is given the sizes of x alone."""
    if x.shape[1] != convolution.in_channels:
        raise ValueError(
            f"expected an input of {convolution.in_channels} channels, got {x.shape[1]}: the shape is {tuple(x.shape)}"
        )


def fused_block(
    x: Tensor, parts: Parts, residual: Tensor | None = None, *, scheme: bool | None = None, backend: str = "auto"
) -> Tensor:
    """``residual + block(x)`` by the fused ops, with the running statistics moved as the plain modules move them.

    Args:
        x: (N, C, H, W) of float16, bfloat16, float32 or float64, any layout; channels_last is read in place.
        parts: modules that `why_not_fusable` has no objection to.
        residual: of the output's shape, or None.
        scheme: True recomputes the expanded map, False stores it, None takes the faster.
        backend: of every op.

    Returns:
        (N, out_channels, ceil(H / stride), ceil(W / stride)), channels_last, dtype of x (that of autocast under it).
        Deterministic.

    Raises:
        ValueError: x has another number of channels, or a normalization in training mode sees one value per channel.
    """
    check_channels(x, parts.depthwise if parts.expand is None else parts.expand)
    adds_input = residual is x
    x = autocast_input(x)
    # torch.compile does not trace a function that is given one tensor twice.
    residual = None if residual is None or adds_input else maps.channels_last(residual.to(x.dtype))
    gate = parts.gate
    modules = (parts.expand_norm, parts.depthwise_norm, parts.project_norm)
    dtype, counts = accumulation_dtype(x.dtype), _counts(x, parts.depthwise.stride[0])
    norms = tuple([batch_norm.norm_of(module, dtype, count) for module, count in zip(modules, counts, strict=True)])
    moved_here = any(
        norm.running is None and not norm.frozen and module is not None
        for module, norm in zip(modules, norms, strict=True)
    )
    options = Options(
        parts.expand_activation,
        parts.depthwise_activation,
        maps.IDENTITY if gate is None else gate.activation,
        maps.IDENTITY if gate is None else gate.gate_activation,
        parts.depthwise.stride[0],
        norms,  # type: ignore[arg-type]
        adds_input,
        expand_free(x, backend) if scheme is None else scheme,
        moved_here,
        backend,
    )
    constants = [
        batch_norm.constant_statistics(module, dtype, backend=backend) if norm.frozen and module is not None else None
        for module, norm in zip(modules, norms, strict=True)
    ]
    out, *statistics = Block.apply(options, x, residual, *constants, *weights_of(parts))
    if moved_here:
        of_batch = iter(statistics)
        for module, norm, count in zip(modules, norms, counts, strict=True):
            if module is not None and not norm.frozen:
                seen = next(of_batch)
                if norm.running is None:
                    batch_norm.update_running(module, seen, count)
    result: Tensor = out
    return result


def _counts(x: Tensor, stride: int) -> tuple[int, int, int]:
    """How many values per channel the three normalizations see."""
    samples, _, height, width = x.shape
    after = samples * ((height + stride - 1) // stride) * ((width + stride - 1) // stride)
    return samples * height * width, after, after
