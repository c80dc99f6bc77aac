"""Batch normalization with its activation, and the two layers that it replaces."""

from __future__ import annotations

import torch
from torch import Tensor

from biasloss_ext.benchmarks import composition
from biasloss_ext.benchmarks.composition import ACTIVATION, EPS, Parameters
from biasloss_ext.benchmarks.contender import Cost, Inputs, Op, Workload
from biasloss_ext.ops.batch_norm import op


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    return composition.images_and_gradient(workload, device, (workload.batch, *workload.sample))


def cost(workload: Workload) -> Cost:
    """In training the map must be read once more for its moments, and with its gradient for the sums: from the cache where that
    holds it, so that these reads are not counted. A map that no cache holds gets no further than 5 / 8 of the ceiling."""
    # Scale and shift, the five operations of a hard swish.
    return composition.least(workload, workload.activations, 2 * workload.sample[0], flops=7 * workload.activations)


def _draw(workload: Workload) -> Parameters:
    return composition.norm_parameters(workload.sample[0], ())


def _chain(workload: Workload, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    return (composition.normalized(workload, x, parameters),)


def _ours(workload: Workload, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    moments, affine = composition.statistics_of(workload, x, parameters)
    h = op.apply(x, affine, activation=ACTIVATION)
    if not workload.backward:
        return (h,)
    coefficients = op.coefficients(gradient, x, affine, moments, activation=ACTIVATION, eps=EPS)
    grad_x = op.backward(gradient, x, affine, coefficients, activation=ACTIVATION)
    return h, grad_x, *coefficients[4:].unbind()


CONTENDERS = composition.contenders(_draw, _chain, _ours, ("batch_norm",))

OP = Op("batch_norm", CONTENDERS, make_inputs, cost, composition.TOLERANCE)
