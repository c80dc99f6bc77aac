"""`FusedBiasLoss` and its peers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Op, Workload
from biasloss_ext.benchmarks.feature_variance import TOLERANCE, make_features
from biasloss_ext.benchmarks.peers.authors import ALPHA, BETA, AuthorsBiasLoss
from biasloss_ext.benchmarks.peers.compiled import MODES, compiled
from biasloss_ext.benchmarks.peers.liger import liger_cross_entropy
from biasloss_ext.functional import feature_variance
from biasloss_ext.loss import FusedBiasLoss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    output = 3 * torch.randn(workload.batch, workload.classes, device=device)
    target = torch.randint(workload.classes, (workload.batch,), device=device)
    return make_features(workload, device), output.to(workload.dtype).requires_grad_(workload.backward), target


def cost(workload: Workload) -> Cost:
    scores = workload.batch * workload.classes
    # Scores are read by both passes, the gradient is written. An exponential is counted as one operation.
    traffic = workload.activations + scores * (3 if workload.backward else 1)
    flops = 4 * workload.activations + scores * (8 if workload.backward else 4)
    return Cost(traffic * workload.dtype.itemsize, flops, "read")


def _exact_bias_loss(features: Tensor, output: Tensor, target: Tensor) -> Tensor:
    variance = features.double().flatten(1).var(1)
    smallest = variance.min()
    weight = torch.exp(ALPHA * (variance - smallest) / (variance.max() - smallest)) - BETA
    return (weight * F.cross_entropy(output, target, reduction="none")).mean()


def _exact_cross_entropy(features: Tensor, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def _built(loss: Loss, exact: Loss) -> Built:
    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        features, output, target = inputs
        value = loss(features, output, target)
        return (value, *torch.autograd.grad(value, output)) if output.requires_grad else (value,)

    def in_float64(inputs: Inputs) -> tuple[Tensor, ...]:
        features, output, target = inputs
        output = output.detach().double().requires_grad_(output.requires_grad)
        value = exact(features, output, target)
        return (value, *torch.autograd.grad(value, output)) if output.requires_grad else (value,)

    return Built(step, in_float64)


def _ours(workload: Workload, device: torch.device) -> Built:
    return _built(FusedBiasLoss().to(device), _exact_bias_loss)


def _variance_given(workload: Workload, device: torch.device) -> Built:
    """The model handed the variance over: what is left is to weigh and to reduce."""
    loss_fn = FusedBiasLoss().to(device)
    known: dict[int, Tensor] = {}

    def loss(features: Tensor, output: Tensor, target: Tensor) -> Tensor:
        if features.data_ptr() not in known:
            known[features.data_ptr()] = feature_variance(features)
        value = loss_fn(None, output, target, variance=known[features.data_ptr()])
        assert isinstance(value, Tensor)
        return value

    return _built(loss, _exact_bias_loss)


def _authors(mode: str | None = None) -> Callable[[Workload, torch.device], Built]:
    def build(workload: Workload, device: torch.device) -> Built:
        loss = AuthorsBiasLoss()
        return _built(loss if mode is None else compiled(loss, mode), _exact_bias_loss)

    return build


def _cross_entropy(workload: Workload, device: torch.device) -> Built:
    return _built(_exact_cross_entropy, _exact_cross_entropy)


def _read_and_cross_entropy(workload: Workload, device: torch.device) -> Built:
    def loss(features: Tensor, output: Tensor, target: Tensor) -> Tensor:
        features.sum(dim=None, dtype=torch.float32)
        return F.cross_entropy(output, target)

    return _built(loss, _exact_cross_entropy)


def _liger(workload: Workload, device: torch.device) -> Built:
    function = liger_cross_entropy(device)
    return _built(lambda features, output, target: function(output, target), _exact_cross_entropy)


CONTENDERS = (
    Contender("biasloss_ext", "ours", _ours, capturable=True),
    Contender("biasloss_ext, variance given", "variant", _variance_given, capturable=True),
    Contender("authors, eager", "peer", _authors()),
    *(
        Contender(f"authors, {name}", "peer", _authors(mode), slow_on=("cpu",) if mode == "max-autotune" else ())
        for name, mode in MODES.items()
    ),
    Contender("features.sum() + cross_entropy", "context", _read_and_cross_entropy, capturable=True),
    Contender("cross_entropy", "context", _cross_entropy, capturable=True),
    Contender("Liger cross_entropy", "context", _liger, overwrites_inputs=True),
)

OP = Op("bias_loss", CONTENDERS, make_inputs, cost, TOLERANCE)
