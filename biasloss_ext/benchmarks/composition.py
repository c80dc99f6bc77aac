"""What the benchmarks of the blocks' ops have in common: a chain of PyTorch's own layers, and the ops that replace it.

The chain has inputs of one map (or matrix) and the gradient of its first output. A forward workload normalizes by running
statistics, as in evaluation; a workload with both passes by those of the batch, as in training, and ends with the gradients
of the input and of every parameter. Ours computes the same from the same, with whatever ops that takes: in a block some of
their passes are shared with the op before or after. Every activation is a hard swish, the more expensive of the network's two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Unavailable, Workload
from biasloss_ext.benchmarks.peers.compiled import compiled
from biasloss_ext.ops import maps, registry
from biasloss_ext.ops.backends import choose
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.library import accumulation_dtype

SEED = 0
EPS = 1e-3
ACTIVATION = maps.HARDSWISH
# Rounding to the other side of a kink of the activation changes a position's slope by a half, which moves all of a channel's
# gradients; a few among millions are expected. In float32 nothing else is as large as 1e-6.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# FLOP a byte from which arithmetic, not memory, bounds float32 on the CPUs seen so far.
BALANCE = 16


class Parameters(NamedTuple):
    """Of a chain, in the accumulation dtype.

    Attributes:
        weights: of convolutions and linear layers.
        norm: weight and bias of the normalization, or none.
        running: its running statistics as moments (2, C), or None.
    """

    weights: tuple[Tensor, ...]
    norm: tuple[Tensor, ...] = ()
    running: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype, norm_dtype: torch.dtype, *, grad: bool) -> Parameters:
        """Copies; ``grad``: whose gradients are wanted."""

        def copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.to(device, dtype, copy=True).requires_grad_(grad)

        return Parameters(
            tuple(copied(tensor, dtype) for tensor in self.weights),
            tuple(copied(tensor, norm_dtype) for tensor in self.norm),
            None if self.running is None else self.running.to(device, norm_dtype),
        )

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (*self.weights, *self.norm)


Draw = Callable[[Workload], Parameters]
Chain = Callable[[Workload, Tensor, Parameters], tuple[Tensor, ...]]
Ours = Callable[[Workload, Tensor, Tensor, Parameters], tuple[Tensor, ...]]


def normalized(workload: Workload, x: Tensor, parameters: Parameters) -> Tensor:
    """The chain's ``act(BN(x))`` in plain PyTorch."""
    mean = variance = None
    if not workload.backward:
        assert parameters.running is not None
        mean, variance = parameters.running.unbind()
    weight, bias = parameters.norm
    return F.hardswish(F.batch_norm(x, mean, variance, weight, bias, training=workload.backward, eps=EPS))


def finish(parameters: Parameters) -> dict[str, Any]:
    """The arguments by which an op finishes the statistics of the normalization."""
    weight, bias = parameters.norm
    return {"norm_weight": weight, "norm_bias": bias, "eps": EPS}


def statistics_of(workload: Workload, x: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Moments and affine (2, C) by which the workload normalizes x."""
    if workload.backward:
        statistics = batch_norm_op.statistics(x, **finish(parameters))
    else:
        assert parameters.running is not None
        statistics = batch_norm_op.affine(parameters.running, 0, **finish(parameters))
    return statistics[:2], statistics[2:]


def norm_parameters(channels: int, weights: tuple[Tensor, ...]) -> Parameters:
    norm = (1 + 0.2 * torch.randn(channels), 0.2 * torch.randn(channels))
    running = torch.stack((0.1 * torch.randn(channels), torch.empty(channels).uniform_(0.5, 2.0)))
    return Parameters(weights, norm, running)


def drawn_weight(*shape: int) -> Tensor:
    """Random, so that the outputs are about as large as the inputs."""
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


def contenders(draw: Draw, chain: Chain, ours: Ours, families: tuple[str, ...]) -> tuple[Contender, ...]:
    """Ours, and ``chain`` in both memory formats and compiled."""
    return (
        our_contender("biasloss_ext", draw, chain, ours, families),
        plain_contender("PyTorch NCHW", draw, chain),
        plain_contender("PyTorch channels_last", draw, chain, channels_last=True),
        compiled_contender("torch.compile", draw, chain),
    )


def our_contender(name: str, draw: Draw, chain: Chain, ours: Ours, families: tuple[str, ...]) -> Contender:
    """``ours`` where all ops of the ``families`` have kernels; `Unavailable` elsewhere."""

    def build(workload: Workload, device: torch.device) -> Built:
        for op in registry.OPS.values():
            if op.family in families and choose("auto", device, op.name) == "reference":
                raise Unavailable(f"{op.name} has no kernels for {device.type} here")
        parameters = _drawn(draw, workload)
        wide = accumulation_dtype(workload.dtype)
        prepared = parameters.to(device, wide, wide, grad=False)

        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return ours(workload, inputs[0], inputs[1], prepared)

        return Built(step, _exact(parameters, chain, workload, device))

    return Contender(name, "ours", build, capturable=True, channels_last=True)


def plain_contender(name: str, draw: Draw, chain: Chain, *, channels_last: bool = False) -> Contender:
    def build(workload: Workload, device: torch.device) -> Built:
        return _plain(draw, chain, chain, workload, device)

    return Contender(name, "peer", build, capturable=True, channels_last=channels_last)


def compiled_contender(name: str, draw: Draw, chain: Chain) -> Contender:
    """``chain`` through `torch.compile`, on channels_last maps. It takes seconds to build, a workload."""

    def build(workload: Workload, device: torch.device) -> Built:
        run = compiled(lambda x, parameters: chain(workload, x, parameters), "default")
        return _plain(draw, chain, lambda _, x, parameters: run(x, parameters), workload, device)

    return Contender(name, "peer", build, channels_last=True, slow_on=("cpu", "cuda"))


def _plain(draw: Draw, chain: Chain, timed: Chain, workload: Workload, device: torch.device) -> Built:
    parameters = _drawn(draw, workload)
    prepared = parameters.to(device, workload.dtype, torch.float32, grad=workload.backward)

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        return _run(workload, timed, inputs[0], inputs[1], prepared)

    return Built(step, _exact(parameters, chain, workload, device))


def _exact(
    parameters: Parameters, chain: Chain, workload: Workload, device: torch.device
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    def exact(inputs: Inputs) -> tuple[Tensor, ...]:
        wide = parameters.to(device, torch.float64, torch.float64, grad=workload.backward)
        x, gradient = (tensor.detach().double() for tensor in inputs)
        return _run(workload, chain, x.requires_grad_(workload.backward), gradient, wide)

    return exact


def _run(workload: Workload, chain: Chain, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    if not workload.backward:
        with torch.inference_mode():
            return chain(workload, x, parameters)
    outputs = chain(workload, x, parameters)
    gradient = gradient.to(outputs[0].dtype)
    return (*outputs, *torch.autograd.grad(outputs[0], (x, *parameters.leaves), gradient))


def _drawn(draw: Draw, workload: Workload) -> Parameters:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return draw(workload)


def least(workload: Workload, outputs: int, weights: int, flops: int) -> Cost:
    """Cost of a chain, all fused: the input and weights read, ``outputs`` elements written; backward reads the output's
    gradient and the input again, and writes the gradients. ``flops``: of the forward pass; backward takes twice as many."""
    elements = workload.activations + outputs + weights
    if workload.backward:
        elements += outputs + 2 * workload.activations + 2 * weights
        flops *= 3
    size = elements * workload.dtype.itemsize
    bound_by_arithmetic = workload.dtype == torch.float32 and flops > BALANCE * size
    return Cost(size, flops, "matmul" if bound_by_arithmetic else "copy")


def images_and_gradient(workload: Workload, device: torch.device, gradient_shape: tuple[int, ...]) -> Inputs:
    images = torch.randn(workload.batch, *workload.sample, device=device, dtype=workload.dtype)
    gradient = torch.randn(gradient_shape, device=device, dtype=workload.dtype)
    return images.requires_grad_(workload.backward), gradient
