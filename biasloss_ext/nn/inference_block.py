"""Blocks and layers with everything constant prepared: for evaluation, without gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.activations import number_of
from biasloss_ext.nn.chain import NO_CONVOLUTION, POINTWISE, Chain, Gate, Step, rows_read
from biasloss_ext.nn.chain_walk import OnLoad, walk
from biasloss_ext.nn.fused_chain import autocast_input, can_recompute, check_channels, constants_of, takes_fused_path
from biasloss_ext.nn.plan import Plan, fits, only_map
from biasloss_ext.nn.pooling import average_to
from biasloss_ext.nn.prepared import Prepared
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.depthwise import dilated
from biasloss_ext.ops.depthwise import op as depthwise
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite

COLUMNS = 16  # that the kernels want a weight to be padded to, so that they take it as it lies


def packed(weight: Tensor) -> Tensor:
    """A (K, C, 1, 1) weight as a view of (C, K) memory whose rows are padded with zeros: what the product reads.

    Rows are an odd number of cache lines apart, so that they do not share the same sets of a cache."""
    outputs, inputs = weight.shape[:2]
    memory = weight.new_zeros(inputs, ((outputs + COLUMNS - 1) // COLUMNS | 1) * COLUMNS)
    memory[:, :outputs] = weight.flatten(1).T
    return memory[:, :outputs].T[:, :, None, None]


def taps_first(weight: Tensor) -> Tensor:
    """A (C, 1, k, k) weight as a view of (k, k, C) memory."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def constant_affine(norm: nn.BatchNorm2d, dtype: torch.dtype) -> Tensor:
    """Scale and shift (2, C) of a normalization by its running statistics.

    Raises:
        ValueError: it has none.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a normalization without running statistics cannot be folded: track_running_stats is False")
    return batch_norm.constant_statistics(norm, dtype)[2:].contiguous()


class PreparedGate(NamedTuple):
    """The operands of a squeeze-and-excitation."""

    tensors: tuple[Tensor, ...]
    activation: int
    gate_activation: int

    @staticmethod
    def of(gate: Gate | None, dtype: torch.dtype) -> PreparedGate | None:
        if gate is None:
            return None
        tensors = []
        for layer in (gate.reduce, gate.excite):
            bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
            tensors += [layer.weight.detach().flatten(1), bias.detach()]
        operands = tuple(tensor.to(dtype).contiguous() for tensor in tensors)
        return PreparedGate(operands, gate.activation, gate.gate_activation)

    def __call__(self, pooled: Tensor) -> Tensor:
        options: dict[str, Any] = {"activation": self.activation, "gate_activation": self.gate_activation}
        gate: Tensor = squeeze_excite.forward(pooled, *self.tensors, **options)[0]
        return gate


class PreparedStep(NamedTuple):
    """A step with constant operands.

    Attributes:
        weight: of the convolution; the normalization after it is folded into that of a 1x1 convolution.
        bias: of a 1x1 convolution, with the normalization folded in.
        affine: of the normalization of any step.
        expand: of a 1x1 convolution before a depthwise one, packed and without the normalization.
        taps: of a depthwise convolution after a 1x1 one.
    """

    kind: int
    stride: int
    same_padding: bool
    dilation: int
    activation: int
    affine: Tensor
    gate: PreparedGate | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    expand: Tensor | None = None
    taps: Tensor | None = None

    def convolved(self, x: Tensor, affine: Tensor | None, activation: int) -> Tensor:
        """Of a depthwise convolution."""
        on_load: dict[str, Any] = {"affine": affine, "activation": activation}
        if self.dilation > 1:
            return dilated.forward(x, self.weight, dilation=self.dilation, **on_load)[0]  # type: ignore[arg-type]
        geometry: dict[str, Any] = {"stride": self.stride, "same_padding": self.same_padding}
        y: Tensor = depthwise.forward(x, self.weight, **on_load, **geometry)[0]
        return y

    @staticmethod
    def of(step: Step, dtype: torch.dtype) -> PreparedStep:
        affine = constants_of(step, dtype)[2:].contiguous()
        convolution = step.convolution
        stride = 1 if convolution is None else convolution.stride[0]
        gate = PreparedGate.of(step.gate, dtype)
        made = PreparedStep(step.kind, stride, step.same_padding, step.dilation, step.activation, affine, gate)
        if convolution is None or step.kind == NO_CONVOLUTION:
            return made
        weight = convolution.weight.detach().to(dtype)
        if step.kind == POINTWISE:
            scale, shift = affine
            folded = packed(weight * scale[:, None, None, None])
            return made._replace(weight=folded, bias=shift.contiguous(), expand=packed(weight))
        return made._replace(weight=weight.contiguous(), taps=taps_first(weight.contiguous()))


class PreparedChain:
    """A chain with constant operands: one op per step, one for an expansion and the depthwise convolution after it."""

    def __init__(self, chain: Chain, dtype: torch.dtype) -> None:
        self.channels, self.skips = chain.channels, chain.steps[0].skips
        self.steps = [PreparedStep.of(step, dtype) for step in chain.steps]

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        check_channels(x, self.channels)
        x = autocast_input(rows_read(x, self.skips))
        residual = None if residual is None else maps.channels_last(residual.to(x.dtype))
        return walk(self.steps, EAGER, x, residual)


class Eager:
    """The operations of a chain, computed at once."""

    def can_recompute(self, x: Tensor) -> bool:
        return can_recompute(x, "auto")

    def expand_depthwise(self, x: Tensor, step: PreparedStep, after: PreparedStep) -> tuple[Tensor, Tensor | None]:
        h, pooled = expand_depthwise.activate(
            x,
            step.expand,
            step.affine,
            after.taps,
            after.affine,
            activation=step.activation,
            stride=after.stride,
            same_padding=after.same_padding,
            y_activation=after.activation,
            want_pool=after.gate is not None,
        )
        return h, None if after.gate is None else pooled

    def pointwise(self, x: Tensor, step: PreparedStep, on_load: OnLoad, residual: Tensor | None) -> Tensor:
        affine, activation, gate = on_load
        loaded: dict[str, Any] = {"affine": affine, "activation": activation, "gate": gate}
        options: dict[str, Any] = {"bias": step.bias, "output_activation": step.activation, "residual": residual}
        y: Tensor = pointwise.forward(x, step.weight, **loaded, **options)[0]
        return y

    def depthwise(self, x: Tensor, step: PreparedStep, on_load: OnLoad) -> Tensor:
        return step.convolved(x, on_load.affine, on_load.activation)

    def pool(self, x: Tensor, on_load: OnLoad) -> Tensor:
        pooled: Tensor = pool_variance.forward(x, affine=on_load.affine, activation=on_load.activation)[0]
        return pooled

    def gate(self, pooled: Tensor, gate: PreparedGate) -> Tensor:
        return gate(pooled)

    def normalize(self, x: Tensor, on_load: OnLoad, residual: Tensor | None) -> Tensor:
        y: Tensor = batch_norm_op.apply(x, on_load.affine, activation=on_load.activation, residual=residual)
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


EAGER = Eager()


class InferenceBlock(Prepared):
    """A block, from its plan."""

    def __init__(self, plain: nn.Module, plan: Plan) -> None:
        super().__init__(plain)
        self.inference_plan = plan
        self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        self.chains = [PreparedChain(planned.chain, self.dtype) for planned in self.inference_plan.chains]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        x = only_map(arguments, options)
        if x is None or not takes_fused_path(x, "auto", None, type(self).__name__):
            return self.plain(*arguments, **options)
        return self.inference_plan.run(self.plain, self, x)

    def run_chain(self, index: int, x: Tensor, residual: Tensor | None) -> Tensor:
        """As the functions of a plan ask for it."""
        chain = self.chains[index]
        if residual is None or fits(x, self.inference_plan.chains[index].chain, residual):
            return chain(x, residual)
        return chain(x, None) + residual


class InferenceSkipBlock(Prepared):
    """`SkipBlock`, prepared."""

    def __init__(self, plain: nn.Module, chain: Chain) -> None:
        super().__init__(plain)
        self.chain = chain
        self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        self.prepared = PreparedChain(self.chain, self.dtype)

    def forward(self, early: Tensor, later: Tensor) -> Tensor:
        if not takes_fused_path(early, "auto", None, type(self).__name__):
            result: Tensor = self.plain(early, later)
            return result
        return self.prepared(average_to(early, (later.shape[-2], later.shape[-1])), later)


class InferenceConvNorm(Prepared):
    """Convolution, batch normalization and activation, prepared; `plain` is a `FusedConvNormActivation`."""

    def __init__(self, plain: nn.Module, is_pointwise: bool) -> None:
        super().__init__(plain)
        number = number_of(plain[2]) if len(plain) == 3 else maps.IDENTITY  # type: ignore[arg-type, index]
        assert number is not None
        self.activation, self.is_pointwise = number, is_pointwise
        self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        conv, norm, dtype = self.plain[0], self.plain[1], self.dtype  # type: ignore[index]
        self.affine = constant_affine(norm, dtype)
        scale, shift = self.affine
        folded = conv.weight.to(dtype) * scale[:, None, None, None]
        self.weight = packed(folded) if self.is_pointwise else maps.channels_last(folded.to(conv.weight.dtype))
        bias = 0 if conv.bias is None else conv.bias.to(dtype) * scale
        self.bias = (shift + bias).to(dtype if self.is_pointwise else conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not takes_fused_path(x, "auto", None, type(self).__name__):
            result: Tensor = self.plain(x)
            return result
        x = autocast_input(x)
        if self.is_pointwise:
            y: Tensor = pointwise.forward(x, self.weight, bias=self.bias, output_activation=self.activation)[0]
            return y
        return maps.channels_last(maps.activate(self._convolve(x), self.activation))

    def _convolve(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.plain[0]._conv_forward(x, self.weight, self.bias)  # type: ignore[index, operator]
        return convolved

    def can_pool(self, x: Tensor) -> bool:
        hooked = self._forward_hooks or self._forward_pre_hooks
        return self.is_pointwise and not hooked and takes_fused_path(x, "auto", None, type(self).__name__)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `FusedHead.pool`."""
        x = autocast_input(x)
        y, _ = pointwise.forward(x, self.weight, bias=self.bias)
        pooled, variance = pool_variance.forward(y, activation=self.activation, want_variance=True)
        return pooled, variance
