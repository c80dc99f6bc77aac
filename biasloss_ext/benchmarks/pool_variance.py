"""Normalization, activation, global average pool and variance in one, and the chain of layers that they replace."""

from __future__ import annotations

import torch
from torch import Tensor

from biasloss_ext.benchmarks import composition
from biasloss_ext.benchmarks.composition import ACTIVATION, EPS, Parameters
from biasloss_ext.benchmarks.contender import Cost, Inputs, Op, Workload
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.pool_variance import op


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    return composition.images_and_gradient(workload, device, (workload.batch, workload.sample[0]))


def cost(workload: Workload) -> Cost:
    outputs = workload.batch * (workload.sample[0] + workload.option("variance"))
    # Scale and shift, the five operations of a hard swish, two sums.
    return composition.least(workload, outputs, 2 * workload.sample[0], flops=10 * workload.activations)


def _draw(workload: Workload) -> Parameters:
    return composition.norm_parameters(workload.sample[0], ())


def _chain(workload: Workload, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    h = composition.normalized(workload, x, parameters)
    pooled = h.mean((2, 3))
    return (pooled, h.detach().flatten(1).var(1)) if workload.option("variance") else (pooled,)


def _ours(workload: Workload, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    moments, affine = composition.statistics_of(workload, x, parameters)
    want_variance = bool(workload.option("variance"))
    pooled, variance = op.forward(x, affine=affine, activation=ACTIVATION, want_variance=want_variance)
    outputs = (pooled, variance) if want_variance else (pooled,)
    if not workload.backward:
        return outputs
    du, coefficients = op.backward(
        gradient.to(affine.dtype), x, affine=affine, moments=moments, activation=ACTIVATION, eps=EPS
    )
    return *outputs, batch_norm_op.backward(du, x, affine, coefficients), *coefficients[4:].unbind()


CONTENDERS = composition.contenders(_draw, _chain, _ours, ("pool_variance", "batch_norm"))

OP = Op("pool_variance", CONTENDERS, make_inputs, cost, composition.TOLERANCE)
