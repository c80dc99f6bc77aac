"""Chains: convolutions, each with its normalization and activation, that one autograd function computes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from biasloss_ext.nn.chain_parts import DEPTHWISE, NO_CONVOLUTION, POINTWISE, Weights
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d
from biasloss_ext.nn.members import parameter
from biasloss_ext.nn.padding import pads_same
from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise.op import output_size

KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)
EXACT_LAYERS = (nn.Conv2d, nn.Linear, DepthwiseConv2d)


class Gate(NamedTuple):
    """A squeeze-and-excitation: two linear or 1x1 convolution layers, activations as in `ops.maps`."""

    reduce: nn.Linear | nn.Conv2d
    excite: nn.Linear | nn.Conv2d
    activation: int
    gate_activation: int


class Step(NamedTuple):
    """``gate(act(scale * norm(convolution(x))))``, where all but one of the first two may be missing. `scale` is a layer scale:
    a module and the name of its parameter of one value per channel."""

    convolution: nn.Conv2d | None
    norm: nn.Module | None
    activation: int = maps.IDENTITY
    gate: Gate | None = None
    scale: tuple[nn.Module, str] | None = None

    @property
    def kind(self) -> int:
        if self.convolution is None or is_scaling(self.convolution):
            return NO_CONVOLUTION
        return POINTWISE if self.convolution.kernel_size == (1, 1) and self.convolution.groups == 1 else DEPTHWISE

    @property
    def same_padding(self) -> bool:
        return type(self.convolution) not in EXACT_LAYERS and self.kind == DEPTHWISE

    @property
    def dilation(self) -> int:
        return self.convolution.dilation[0] if self.convolution is not None and self.kind == DEPTHWISE else 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Of the map that the step makes of one of this size."""
        stride = 1 if self.convolution is None else self.convolution.stride[0]
        return output_size(height, stride), output_size(width, stride)

    @property
    def skips(self) -> int:
        """Every how many rows and columns a 1x1 convolution reads one; only the first step of a chain may skip any."""
        return 1 if self.convolution is None or self.kind == DEPTHWISE else self.convolution.stride[0]

    @property
    def modules(self) -> list[nn.Module]:
        gate = () if self.gate is None else (self.gate.reduce, self.gate.excite)
        return [module for module in (self.convolution, self.norm, *gate) if module is not None]


def channels_of(norm: nn.Module | None) -> int:
    """Of a normalization by a batch or by constants."""
    count = getattr(norm, "num_features", None)
    if count is None:
        count = norm.running_var.numel()  # type: ignore[union-attr, operator]
    return int(count)


class Chain(NamedTuple):
    """Steps, and the other modules that these stand for: activations, and containers that are not called."""

    steps: tuple[Step, ...]
    others: tuple[nn.Module, ...] = ()

    @property
    def layers(self) -> list[nn.Module]:
        """Whose parameters the ops read."""
        return [module for step in self.steps for module in step.modules]

    @property
    def channels(self) -> int:
        """Of the input."""
        first = self.steps[0]
        if first.convolution is not None:
            return first.convolution.in_channels
        return channels_of(first.norm)


def rows_read(x: Tensor, skips: int) -> Tensor:
    """The rows and columns of a map that a step reads, by its `Step.skips`."""
    return x if skips == 1 else x[:, :, ::skips, ::skips]


def is_scaling(convolution: nn.Conv2d) -> bool:
    """Whether a convolution multiplies each channel by a number: it is depthwise and 1 x 1."""
    return convolution.kernel_size == (1, 1) and convolution.groups == convolution.in_channels > 1


def why_not_convolved(convolution: nn.Conv2d) -> str | None:
    """Why a chain has no step for a convolution; None where it has."""
    kernel, channels = convolution.kernel_size, convolution.in_channels
    if convolution.padding_mode != "zeros":
        return f"a convolution pads with {convolution.padding_mode} values, not with zeros"
    if kernel == (1, 1) and convolution.groups in (1, channels):
        if convolution.groups > 1 and convolution.out_channels != channels:
            return f"{channels} channels in {convolution.groups} groups to {convolution.out_channels}, not depthwise"
        if convolution.stride[0] != convolution.stride[1]:
            return f"a 1 x 1 convolution has stride {convolution.stride}"
        if convolution.padding not in ((0, 0), "valid", "same"):
            return f"a 1 x 1 convolution pads by {convolution.padding}"
        return None
    if convolution.groups != channels or convolution.out_channels != channels:
        return f"{channels} channels in {convolution.groups} groups to {convolution.out_channels}, not depthwise"
    if kernel[0] != kernel[1] or kernel[0] not in KERNEL_SIZES:
        return f"the kernel is {kernel[0]} x {kernel[1]}, there are {', '.join(f'{k} x {k}' for k in KERNEL_SIZES)}"
    if convolution.stride[0] != convolution.stride[1] or convolution.stride[0] not in STRIDES:
        return f"the stride is {convolution.stride}, there are 1 and 2"
    same = (convolution.padding == "same" and convolution.stride == (1, 1)) or pads_same(convolution)
    dilation = convolution.dilation[0]
    if dilation > 1 and convolution.stride != (1, 1):
        return f"the dilation is {dilation} and the stride {convolution.stride}"
    if convolution.dilation != (dilation,) * 2 or not (same or convolution.padding == (kernel[0] // 2 * dilation,) * 2):
        return (
            f"the padding is {convolution.padding} and the dilation {convolution.dilation}, not those of the same size"
        )
    return None


def why_not_fusable(chain: Chain) -> str | None:
    """Why a chain has no fused kernels, or None."""
    for step in chain.steps:
        objection = None if step.convolution is None else why_not_convolved(step.convolution)
        if objection is not None:
            return objection
    return why_not_bypassed(chain)


def why_not_bypassed(chain: Chain) -> str | None:
    """Why a module of the chain must be called, rather than only its parameters read; None where none must."""
    for step in chain.steps:
        for module in step.modules:
            if module is not step.norm and type(module) not in EXACT_LAYERS and not pads_same(module):
                return f"{type(module).__name__} may compute something else than its base class"
            if is_watched(module):
                return watched(module)
    for module in chain.others:
        if is_watched(module):
            return watched(module)
    return None


def watched(module: nn.Module) -> str:
    """The sentence about a module that `is_watched`."""
    return f"a {type(module).__name__} has hooks or a forward method of its own"


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


def scale_of(step: Step) -> Tensor | None:
    """The layer scale of a step, (C,)."""
    if step.scale is None:
        return None
    found = parameter(*step.scale)
    return None if found is None else found.flatten()


def factors_of(step: Step) -> Tensor | None:
    """What a depthwise 1x1 convolution multiplies the channels by, (C,); None for a step of another kind."""
    if step.convolution is None or not is_scaling(step.convolution):
        return None
    found = parameter(step.convolution, "weight")
    return None if found is None else found.flatten()


def bias_of(step: Step) -> Tensor | None:
    """What the convolution of a step adds."""
    return None if step.convolution is None else parameter(step.convolution, "bias")


def weights_of(step: Step, bias_factor: Tensor | float) -> Weights:
    """The parameters of a step: those of the modules themselves where nothing but a normalization follows the convolution.

    Args:
        step: whose parameters they are.
        bias_factor: what the normalization multiplies the convolution's bias by: 0 where it subtracts the mean of the batch, in
            which the bias is, too. The bias counts as a part of what is normalized: it shifts the result without being a
            parameter of the normalization.
    """
    norm, bias, scale = step.norm, bias_of(step), scale_of(step)
    gamma, beta = (factors_of(step), bias) if norm is None else (parameter(norm, "weight"), parameter(norm, "bias"))
    if scale is not None:
        gamma = scale if gamma is None else gamma * scale
        beta = None if beta is None else beta * scale
    if norm is not None and bias is not None:
        factor = bias_factor if scale is None else bias_factor * scale.detach()
        beta = bias * factor if beta is None else beta + bias * factor
    convolution = None if step.kind == NO_CONVOLUTION else parameter(step.convolution, "weight")  # type: ignore[arg-type]
    if step.gate is None:
        return Weights(convolution, gamma, beta)
    layers = (step.gate.reduce, step.gate.excite)
    return Weights(
        convolution, gamma, beta, *(parameter(layer, name) for layer in layers for name in ("weight", "bias"))
    )
