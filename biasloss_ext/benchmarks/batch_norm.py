"""Batch normalisation with its activation, and the two layers that it replaces."""

from __future__ import annotations

from typing import Any

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
    return (composition.normalised(workload, x, parameters),)


def _ours(workload: Workload, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    where: dict[str, Any] = {"device": x.device, "backend": "auto"}
    moments = composition.moments_of(workload, x, parameters, **where)
    affine = composition.affine_of(moments, parameters, **where)
    h = op.apply(x, affine, ACTIVATION, None, **where)
    if not workload.backward:
        return (h,)
    sums = op.sums(gradient, x, affine, moments[0], ACTIVATION, **where)
    coefficients, grad_norm = op.coefficients(sums, affine, moments, EPS, x.numel() // x.shape[1], False, **where)
    return h, op.backward(gradient, x, affine, coefficients, ACTIVATION, **where), *grad_norm.unbind()


CONTENDERS = composition.contenders(_draw, _chain, _ours, ("batch_norm",))

OP = Op("batch_norm", CONTENDERS, make_inputs, cost, composition.TOLERANCE)
