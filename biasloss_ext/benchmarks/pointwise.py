"""1x1 convolutions and their peers: the projection of a block with the normalization and activation before it, or the
expansion alone; and `torch.mm` of the same sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.benchmarks import composition
from biasloss_ext.benchmarks.composition import ACTIVATION, EPS, Parameters
from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Op, Step, Workload
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.pointwise import op


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    shape = (workload.batch, workload.option("outputs"), *workload.sample[1:])
    return composition.images_and_gradient(workload, device, shape)


def cost(workload: Workload) -> Cost:
    channels, height, width = workload.sample
    outputs, positions = workload.option("outputs"), workload.batch * height * width
    return composition.least(
        workload, outputs * positions, outputs * channels, flops=2 * positions * outputs * channels
    )


def _draw(workload: Workload) -> Parameters:
    channels = workload.sample[0]
    weight = composition.drawn_weight(workload.option("outputs"), channels, 1, 1)
    return composition.norm_parameters(channels, (weight,)) if workload.option("norm") else Parameters((weight,))


def _chain(workload: Workload, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    h = composition.normalized(workload, x, parameters) if workload.option("norm") else x
    return (F.conv2d(h, parameters.weights[0]),)


def _ours(workload: Workload, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    (weight,) = parameters.weights
    if not workload.option("norm"):
        y, _ = op.forward(x, weight)
        return (y, *op.backward(gradient, x, weight)[:2]) if workload.backward else (y,)
    moments, affine = composition.statistics_of(workload, x, parameters)
    y, _ = op.forward(x, weight, affine=affine, activation=ACTIVATION)
    if not workload.backward:
        return (y,)
    dh, grad_weight, _, _, coefficients = op.backward(
        gradient, x, weight, affine=affine, moments=moments, activation=ACTIVATION, eps=EPS
    )
    grad_x = batch_norm_op.backward(dh, x, affine, coefficients, activation=ACTIVATION)
    return y, grad_x, grad_weight, *coefficients[4:].unbind()


def _mm(workload: Workload, device: torch.device) -> Built:
    """The products alone, of matrices that lie as `torch.mm` likes them."""
    drawn = _draw(workload).weights[0].flatten(1).to(device)

    def products(matrix: Tensor) -> Step:
        def step(inputs: Inputs) -> tuple[Tensor, ...]:
            x, gradient = (tensor.detach().permute(0, 2, 3, 1).flatten(0, 2).to(matrix.dtype) for tensor in inputs)
            y = torch.mm(x, matrix.T)
            return (y, torch.mm(gradient, matrix), torch.mm(gradient.T, x)) if workload.backward else (y,)

        return step

    return Built(products(drawn.to(workload.dtype)), products(drawn.double()))


CONTENDERS = (
    *composition.contenders(_draw, _chain, _ours, ("pointwise", "batch_norm")),
    Contender("torch.mm", "context", _mm, capturable=True, channels_last=True),
)

OP = Op("pointwise", CONTENDERS, make_inputs, cost, composition.TOLERANCE)
