"""Expansion and depthwise convolution in one, and the chain of layers that they replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.benchmarks import composition
from biasloss_ext.benchmarks.composition import ACTIVATION, EPS, Parameters
from biasloss_ext.benchmarks.contender import Cost, Inputs, Op, Workload
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.depthwise.op import output_size
from biasloss_ext.ops.expand_depthwise import op
from biasloss_ext.ops.pointwise import op as pointwise


def _output_shape(workload: Workload) -> torch.Size:
    _, height, width = workload.sample
    stride = workload.option("stride")
    sizes = output_size(height, stride), output_size(width, stride)
    return torch.Size((workload.batch, workload.option("expanded"), *sizes))


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    return composition.images_and_gradient(workload, device, _output_shape(workload))


def cost(workload: Workload) -> Cost:
    """The expanded map is not counted: nobody needs to store it."""
    channels, height, width = workload.sample
    expanded, kernel_size = workload.option("expanded"), workload.option("kernel_size")
    outputs = _output_shape(workload).numel()
    products = workload.batch * height * width * channels * expanded + outputs * kernel_size**2
    return composition.least(workload, outputs, expanded * (channels + kernel_size**2), flops=2 * products)


def _draw(workload: Workload) -> Parameters:
    expanded, kernel_size = workload.option("expanded"), workload.option("kernel_size")
    expand = composition.drawn_weight(expanded, workload.sample[0], 1, 1)
    return composition.norm_parameters(
        expanded, (expand, composition.drawn_weight(expanded, 1, kernel_size, kernel_size))
    )


def _chain(workload: Workload, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    expand, weight = parameters.weights
    h = composition.normalized(workload, F.conv2d(x, expand), parameters)
    padding = workload.option("kernel_size") // 2
    return (F.conv2d(h, weight, stride=workload.option("stride"), padding=padding, groups=h.shape[1]),)


def _ours(workload: Workload, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    expand, weight = parameters.weights
    stride = workload.option("stride")
    if not workload.backward:
        _, affine = composition.statistics_of(workload, x, parameters)
        y, _ = op.forward(x, expand, affine, weight, activation=ACTIVATION, stride=stride)
        return (y,)
    # As in `nn.chain_function`, where the formulas are.
    matrix, count = expand.flatten(1), x.numel() // x.shape[1]
    mean_x, gram = op.gram(x)
    weight_gram, moments = op.product(x, mean_x, gram, matrix, matrix @ gram)
    affine = batch_norm_op.affine(moments, count, **composition.finish(parameters))[2:]
    y, _ = op.forward(x, expand, affine, weight, activation=ACTIVATION, stride=stride)
    grad_x, grad_expand, grad_weight, coefficients = op.backward(
        x, mean_x, expand, affine, moments, weight, y, *_nothing_after(moments),
        grad=gradient, activation=ACTIVATION, stride=stride, eps=EPS,
    )  # fmt: skip
    a, b, c, _, *grad_norm = coefficients.unbind()
    grad_expand = a[:, None] * grad_expand.flatten(1) + b[:, None] * weight_gram
    through_statistics = ((matrix.T * b) @ matrix)[:, :, None, None]
    origin = torch.stack((torch.ones_like(mean_x), -mean_x))
    wide = x.to(grad_x.dtype)
    grad_x, _ = pointwise.forward(wide, through_statistics, affine=origin, bias=c @ matrix, residual=grad_x)
    return y, grad_x.to(x.dtype), grad_expand.reshape(expand.shape), grad_weight, *grad_norm


def _nothing_after(moments: Tensor) -> tuple[Tensor, Tensor]:
    """An affine and coefficients by which the gradient at the output is the one that is given."""
    one, none = torch.ones_like(moments[0]), torch.zeros_like(moments[0])
    return torch.stack((one, none)), torch.stack((one, none, none, none, none, none))


CONTENDERS = composition.contenders(_draw, _chain, _ours, ("expand_depthwise", "pointwise", "batch_norm"))

OP = Op("expand_depthwise", CONTENDERS, make_inputs, cost, composition.TOLERANCE)
