"""torch.compile without graph breaks, torch.export, and torch's own checks of the ops."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor, nn

from biasloss_ext import FeatureTap, FusedBiasLoss
from biasloss_ext.ops.bias_loss import op as bias_loss_op
from biasloss_ext.ops.feature_variance import op as feature_variance_op


def batch(samples: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, 8, 3, 3, generator=generator)
    output = torch.randn(samples, 5, generator=generator).requires_grad_()
    return features, output, torch.randint(5, (samples,), generator=generator)


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    eager, traced = FusedBiasLoss(backend=backend), FusedBiasLoss(backend=backend)
    compiled = torch.compile(traced, fullgraph=True, backend=compiler)
    for samples in (6, 6, 9, 12):  # the third and fourth size are traced with a symbolic batch
        features, output, target = batch(samples)
        loss, weights = compiled(features, output, target, return_weights=True)
        expected, expected_weights = eager(features, output, target, return_weights=True)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(weights, expected_weights)
        torch.testing.assert_close(torch.autograd.grad(loss, output), torch.autograd.grad(expected, output))
        torch.testing.assert_close(traced.running_min, eager.running_min)


@pytest.mark.parametrize("options", [{"normalisation_mode": "local"}, {"reduction": "none", "label_smoothing": 0.1}])
def test_compile_with_options(options: dict[str, object]) -> None:
    torch._dynamo.reset()
    loss_fn = FusedBiasLoss(**options)  # type: ignore[arg-type]
    features, _, _ = batch()
    output = torch.randn(6, 5, 2, 3, requires_grad=True)
    target = torch.softmax(torch.randn(6, 5, 2, 3), 1)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, output, target), loss_fn(features, output, target))


def test_whole_step_compiles() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    images, target = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
    losses = []
    for compiled in (False, True):
        tap, loss_fn = FeatureTap(net, "1"), FusedBiasLoss()

        def step(images: Tensor, target: Tensor, tap: FeatureTap = tap, loss_fn: FusedBiasLoss = loss_fn) -> Tensor:
            return loss_fn(*tap(images), target)

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        loss = run(images, target)
        losses.append((loss, *torch.autograd.grad(loss, list(net.parameters())), loss_fn.running_min))
    for eager, traced in zip(*losses, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_autograd_sees_one_op(backend: str) -> None:
    """As FSDP's compiled backward pass has it: the forward pass runs as it is."""
    features, output, target = batch()
    graphs = []

    def compiler(graph: torch.fx.GraphModule) -> object:
        def capture(traced: torch.fx.GraphModule, _: object) -> object:
            graphs.append(traced)
            return traced

        return torch.compile(graph, backend=capture, fullgraph=True)

    gradients = []
    for enable in (contextlib.nullcontext(), torch._dynamo.compiled_autograd._enable(compiler)):
        output.grad = None
        with enable:
            FusedBiasLoss(backend=backend)(features, output, target).backward()
        assert output.grad is not None
        gradients.append(output.grad)
    torch.testing.assert_close(*gradients)
    assert len(graphs) == 1
    assert ("biasloss_ext.bias_loss_backward" in graphs[0].code) == (backend == "cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_export(backend: str) -> None:
    loss_fn = FusedBiasLoss(backend=backend)
    features, output, target = batch()
    batch_size = torch.export.Dim("batch", min=2)
    shapes = ({0: batch_size}, {0: batch_size}, {0: batch_size})
    program = torch.export.export(loss_fn, (features, output.detach(), target), dynamic_shapes=shapes)
    exported = program.run_decompositions().module()
    features, output, target = batch(9)
    torch.testing.assert_close(exported(features, output.detach(), target), loss_fn(features, output, target).detach())
    torch.testing.assert_close(exported.get_buffer("running_min"), loss_fn.running_min)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck_of_the_loss(layout: str, positions: tuple[int, ...], reduction: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 6, 5, 5)
    output = torch.randn(4, 7, *positions)
    if layout == "transposed":
        features = features.permute(0, 3, 1, 2)
        output = output.transpose(0, 1).contiguous().transpose(0, 1)
    target = torch.randint(7, (4, *positions))
    loss_options = (reduction, -100, 0.1)
    for running_min in (None, torch.tensor(0.5)):
        arguments = (features, None, None, output.clone().requires_grad_(), target, None, running_min, 0.3, 0.3, True)
        torch.library.opcheck(bias_loss_op.forward.native, (*arguments, *loss_options))
    _, *saved = bias_loss_op.forward.native(
        features, None, None, output, target, None, None, 0.3, 0.3, True, *loss_options
    )
    grad_loss = torch.randn((4, *positions) if reduction == 0 else ())
    torch.library.opcheck(
        bias_loss_op.backward.native, (grad_loss, output, target, torch.rand(7), *saved, *loss_options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_the_variance(dtype: torch.dtype) -> None:
    features = torch.randn(4, 6, 5, 5).to(dtype)
    op = feature_variance_op.feature_variance.native
    torch.library.opcheck(op, (features,))
    torch.library.opcheck(op, (features.permute(0, 2, 3, 1),))
    torch.library.opcheck(op, (features[:, ::2],))


def test_deterministic_algorithms_are_no_obstacle() -> None:
    features, output, target = batch()
    torch.use_deterministic_algorithms(True)
    try:
        FusedBiasLoss()(features, output, target).backward()
    finally:
        torch.use_deterministic_algorithms(False)
