"""Runs a chain of plain modules through the fused ops."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.batch_norm import Norm
from biasloss_ext.nn.chain import Chain, Step, bias_of, factors_of, rows_read, scale_of, weights_of
from biasloss_ext.nn.chain_function import ChainFunction
from biasloss_ext.nn.chain_parts import DEPTHWISE, POINTWISE, WEIGHTS, Options, StepOptions, Weights
from biasloss_ext.ops import maps
from biasloss_ext.ops.backends import choose
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.tracing import exporting, transformed

Fused = Literal["auto", True, False]


def why_not_here(x: Tensor) -> str | None:
    """Why the fused ops cannot serve this input, or do not pay; None where they can."""
    if x.dim() != 4:
        return f"the input must be a map of shape (N, C, H, W), got {tuple(x.shape)}"
    if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return f"the input is {x.dtype}"
    return _why_no_kernels(x.device)


def _why_no_kernels(device: torch.device) -> str | None:
    return _missing_kernels(device)


# As torch.compiler.assume_constant_result, which imports much; it has no effect on the wrapper that functools.cache makes.
_why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _missing_kernels(device: torch.device) -> str | None:
    missing = [op for op in ("depthwise", "pointwise", "batch_norm_apply") if choose("auto", device, op) == "reference"]
    return f"no kernels of {', '.join(missing)} can run on {device}" if missing else None


def takes_fused_path(x: Tensor, fused: Fused, objection: str | None, name: str) -> bool:
    """Whether the fused ops are to serve ``x``: not where a hook on all modules waits for the calls of the layers.

    Args:
        x: the input.
        fused: "auto", True or False, as the layer was given it.
        objection: what `chain.why_not_fusable` said of the layer.
        name: of the layer, for the message.

    Raises:
        RuntimeError: ``fused`` is True, and no kernels can run on ``x``; the message has the reason.
    """
    if fused is False or objection is not None or exporting(x) or _has_any_global_hook():
        return False
    if not torch.compiler.is_compiling() and transformed(x):
        reason: str | None = "the fused ops have no torch.func transforms and no forward-mode derivatives"
    else:
        reason = why_not_here(x)
    if reason is not None and fused is True:
        raise RuntimeError(f"{name}(fused=True) cannot run here: {reason}; fused='auto' takes the plain layers instead")
    return reason is None


def can_recompute(x: Tensor, backend: str) -> bool:
    """Whether an expanded map can be recomputed rather than stored."""
    return choose(backend, x.device, "expand_depthwise") != "reference"


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype in which autocast would have a convolution compute, channels_last. Autocast leaves float64 alone."""
    if x.dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return maps.channels_last(x)


def check_channels(x: Tensor, channels: int) -> None:
    """Raise where x has other channels than the first layer takes: a kernel is given the sizes of x alone."""
    if x.shape[1] != channels:
        raise ValueError(f"expected an input of {channels} channels, got {x.shape[1]}: the shape is {tuple(x.shape)}")


def fused_chain(
    x: Tensor, chain: Chain, residual: Tensor | None = None, *, recompute: bool | None = None, backend: str = "auto"
) -> Tensor:
    """``residual + chain(x)`` by the fused ops, with the running statistics moved as the plain modules move them.

    Args:
        x: (N, C, H, W) of float16, bfloat16, float32 or float64, any layout; channels_last is read in place.
        chain: one that `chain.why_not_fusable` has no objection to.
        residual: of the output's shape, or None.
        recompute: True recomputes the map between a first 1x1 convolution and a depthwise one, False stores it, None takes the
            faster.
        backend: of every op.

    Returns:
        (N, out_channels, ceil(H / stride), ceil(W / stride)), channels_last, dtype of x (that of autocast under it).
        Deterministic.

    Raises:
        ValueError: x has another number of channels, or a normalization in training mode sees one value per channel.
    """
    check_channels(x, chain.channels)
    adds_input = residual is x
    x, residual = operands(chain, x, residual)
    return run_call(chain, call_of(chain, x, adds_input, recompute, backend), x, residual)


def operands(chain: Chain, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tensors as the ops take them; no residual where it is x itself."""
    adds_input = residual is x
    x = rows_read(x, chain.steps[0].skips)
    # Autocast casts for convolutions, and leaves normalizations alone.
    convolves = any(step.convolution is not None for step in chain.steps)
    x = autocast_input(x) if convolves else maps.channels_last(x)
    # torch.compile does not trace a function that is given one tensor twice.
    return x, None if residual is None or adds_input else maps.channels_last(residual.to(x.dtype))


Source = tuple[Mapping[Any, Tensor | None], Any]  # a module's parameters, and the name of one of them
NO_PARAMETER: Source = ({None: None}, None)


class Call(NamedTuple):
    """How a chain is computed on maps of one shape.

    Attributes:
        options: of the autograd function.
        counts: values per channel after each step.
        sources: where all weights are, for a chain without constants whose weights are parameters as they are; None otherwise.
    """

    options: Options
    counts: tuple[int, ...]
    sources: tuple[Source, ...] | None = None


def call_of(chain: Chain, x: Tensor, adds_input: bool, recompute: bool | None, backend: str) -> Call:
    """How a chain is computed on maps like ``x``; the arguments are those of `fused_chain`."""
    dtype, (samples, _, height, width) = accumulation_dtype(x.dtype), x.shape
    recomputes = (can_recompute(x, backend) if recompute is None else recompute) and len(chain.steps) > 1
    steps: list[StepOptions] = []
    counts: list[int] = []
    for index, step in enumerate(chain.steps):
        if step.kind == DEPTHWISE:
            height, width = step.output_size(height, width)
        count = samples * height * width
        norm = batch_norm.norm_of(step.norm, dtype, count, moves=bias_of(step) is None)
        is_recomputed = recomputes and index == 0 and _is_recomputable(chain, norm)
        steps.append(_options(step, norm, is_recomputed))
        counts.append(count)
    returns = any(step.norm.is_returned for step in steps)
    return Call(Options(tuple(steps), adds_input, returns, backend), tuple(counts))


def run_call(chain: Chain, call: Call, x: Tensor, residual: Tensor | None) -> Tensor:
    """The result for `operands`, with the running statistics moved."""
    options = call.options
    if call.sources is None:
        constants, weights = _parameters(chain, options, accumulation_dtype(x.dtype))
    else:
        constants, weights = [None] * len(options.steps), [parameters[name] for parameters, name in call.sources]
    out, *statistics = ChainFunction.apply(options, x, residual, *constants, *weights)
    if options.returns_statistics:
        _update_running(chain, options, statistics, call.counts)
    result: Tensor = out
    return result


def _parameters(chain: Chain, options: Options, dtype: torch.dtype) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The constant statistics of each step, and the fields of its `Weights`."""
    constants: list[Tensor | None] = []
    weights: list[Tensor | None] = []
    for step, of_step in zip(chain.steps, options.steps, strict=True):
        norm = of_step.norm
        constants.append(constants_of(step, dtype, backend=options.backend) if norm.frozen else None)
        weights.extend(_weights(step, constants[-1], norm))
    return constants, weights


def sources_of(chain: Chain, options: Options) -> tuple[Source, ...] | None:
    """`Call.sources` of a chain."""
    found: list[Source] = []
    for step, of_step in zip(chain.steps, options.steps, strict=True):
        is_plain = not of_step.norm.frozen and bias_of(step) is None and factors_of(step) is None and step.scale is None
        gate = () if step.gate is None else (step.gate.reduce, step.gate.excite)
        layers = (step.norm, *gate)
        named = [(layer, name) for layer in layers if layer is not None for name in ("weight", "bias")]
        if step.convolution is not None:
            named = [(step.convolution, "weight"), *named]
        if not is_plain or any(name not in layer._parameters for layer, name in named):
            return None
        sources: list[Source] = [(layer._parameters, name) for layer, name in named]
        before = [] if step.convolution is not None else [NO_PARAMETER]
        after = [NO_PARAMETER] * (WEIGHTS - len(before) - len(sources))
        found += [*before, *sources, *after]
    return tuple(found)


def _is_recomputable(chain: Chain, norm: Norm) -> bool:
    first, second = chain.steps[:2]
    is_plain = first.gate is None and norm.sync is None and second.dilation == 1
    return first.kind == POINTWISE and second.kind == DEPTHWISE and is_plain


def _options(step: Step, norm: Norm, is_recomputed: bool) -> StepOptions:
    gate = step.gate
    of_gate = (maps.IDENTITY,) * 2 if gate is None else (gate.activation, gate.gate_activation)
    stride = 1 if step.convolution is None else step.convolution.stride[0]
    geometry = (stride, step.same_padding, step.dilation)
    return StepOptions(step.kind, *geometry, step.activation, *of_gate, norm, is_recomputed)


def constants_of(step: Step, dtype: torch.dtype, *, backend: str = "auto") -> Tensor:
    """Statistics (4, C) of a step whose normalization takes no statistics of the batch, or is missing.

    Raises:
        ValueError: its normalization keeps no running statistics.
    """
    bias, scale = bias_of(step), scale_of(step)
    with torch.no_grad():
        if step.norm is not None:
            found = batch_norm.constant_statistics(step.norm, dtype, bias=bias, backend=backend)
        else:
            assert step.convolution is not None
            ones = step.convolution.weight.new_ones(step.convolution.out_channels, dtype=dtype)
            zeros, factors = torch.zeros_like(ones), factors_of(step)
            rows = (
                zeros,
                ones,
                ones if factors is None else factors.to(dtype),
                zeros if bias is None else bias.to(dtype),
            )
            found = torch.stack(rows)
        if scale is not None:
            found = torch.cat((found[:2], found[2:] * scale.to(dtype)))
    return found


def _weights(step: Step, constants: Tensor | None, norm: Norm) -> Weights:
    if constants is None or step.norm is None or bias_of(step) is None:
        return weights_of(step, 0.0)
    rstd = torch.rsqrt(constants[1] + norm.eps)
    gamma = step.norm.weight
    factor = rstd if gamma is None else rstd * gamma.detach()  # type: ignore[operator, union-attr]
    return weights_of(step, factor.to(step.convolution.bias.dtype))  # type: ignore[union-attr]


def _update_running(chain: Chain, options: Options, statistics: list[Tensor], counts: tuple[int, ...]) -> None:
    """Move the running statistics that no op has moved."""
    returned = iter(statistics)
    for step, of_step, count in zip(chain.steps, options.steps, counts, strict=True):
        if not of_step.norm.is_returned or step.norm is None:
            continue
        seen, bias = next(returned), bias_of(step)
        total: int | Tensor = count if of_step.norm.sync is None else next(returned)
        if bias is not None:
            seen = torch.stack((seen[0] + bias.detach(), seen[1]))
        batch_norm.update_running(step.norm, seen, total)
