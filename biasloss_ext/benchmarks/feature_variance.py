"""`feature_variance` and its peers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Op, Workload
from biasloss_ext.benchmarks.peers.authors import authors_variance
from biasloss_ext.benchmarks.peers.compiled import MODES, compiled
from biasloss_ext.functional import feature_variance

# The deviation differs from sample to sample by as much as in trained networks: with equal ones the weights of
# Bias Loss would rest on the last digits of the variance.
SMALLEST_DEVIATION, LARGEST_DEVIATION = 0.5, 2.0
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def make_features(workload: Workload, device: torch.device) -> Tensor:
    deviation = torch.empty(workload.batch, device=device).uniform_(SMALLEST_DEVIATION, LARGEST_DEVIATION)
    features = torch.randn(workload.batch, *workload.sample, device=device)
    features *= deviation.reshape(-1, *[1] * len(workload.sample))
    memory_format = torch.channels_last if workload.channels_last else torch.contiguous_format
    return features.to(workload.dtype, memory_format=memory_format)


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    return (make_features(workload, device),)


def cost(workload: Workload) -> Cost:
    # A shift, two sums and a square for each activation; the N variances are not counted.
    return Cost(workload.activations * workload.dtype.itemsize, 4 * workload.activations, "read")


def _exact(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs[0].double().flatten(1).var(1),)


def _contender(variance: Callable[[Tensor], Tensor]) -> Callable[[Workload, torch.device], Built]:
    return lambda workload, device: Built(lambda inputs: (variance(inputs[0]),), _exact)


def _compiled(mode: str) -> Callable[[Workload, torch.device], Built]:
    return lambda workload, device: _contender(compiled(authors_variance, mode))(workload, device)


def _sum(workload: Workload, device: torch.device) -> Built:
    return Built(
        lambda inputs: (inputs[0].sum(dim=None, dtype=torch.float32),), lambda inputs: (inputs[0].double().sum(),)
    )


CONTENDERS = (
    Contender("biasloss_ext", "ours", _contender(feature_variance), capturable=True),
    Contender("authors, eager", "peer", _contender(authors_variance), capturable=True),
    *(
        Contender(f"authors, {name}", "peer", _compiled(mode), slow_on=("cpu",) if mode == "max-autotune" else ())
        for name, mode in MODES.items()
    ),
    Contender("features.sum()", "context", _sum, capturable=True),
)

OP = Op("feature_variance", CONTENDERS, make_inputs, cost, TOLERANCE)
