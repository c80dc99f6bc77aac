"""Normalisation, activation, global average pool and variance in one, and the chain of layers that they replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.benchmarks import composition
from biasloss_ext.benchmarks.composition import ACTIVATION, EPS, Parameters
from biasloss_ext.benchmarks.contender import Cost, Inputs, Op, Workload
from biasloss_ext.ops import maps
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
    h = composition.normalised(workload, x, parameters)
    pooled = h.mean((2, 3))
    return (pooled, h.detach().flatten(1).var(1)) if workload.option("variance") else (pooled,)


def _ours(workload: Workload, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    where: dict[str, Any] = {"device": x.device, "backend": "auto"}
    moments = composition.moments_of(workload, x, parameters, **where)
    affine = composition.affine_of(moments, parameters, **where)
    pooled, variance = op.forward(x, affine, ACTIVATION, bool(workload.option("variance")), **where)
    outputs = (pooled, variance) if workload.option("variance") else (pooled,)
    if not workload.backward:
        return outputs
    du, sums = op.backward(gradient.float(), x, affine, moments[0], ACTIVATION, **where)
    coefficients, grad_norm = batch_norm_op.coefficients(
        sums, affine, moments, EPS, x.numel() // x.shape[1], False, **where
    )
    grad_x = batch_norm_op.backward(du, x, affine, coefficients, maps.IDENTITY, **where)
    return *outputs, grad_x, *grad_norm.unbind()


CONTENDERS = composition.contenders(_draw, _chain, _ours, ("pool_variance", "batch_norm"))

OP = Op("pool_variance", CONTENDERS, make_inputs, cost, composition.TOLERANCE)
