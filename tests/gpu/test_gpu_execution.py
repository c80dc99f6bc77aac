"""How the kernels behave on a GPU: streams, graphs, no waiting, determinism, autocast, compilers, process groups; on the
simulated GPU what of that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from biasloss_ext import FusedBiasLoss, functional
from biasloss_ext.ops.native import simulated
from tests.gpu.gpu_inputs import CLASSES, MAPS, make_features, make_scores

LONG = 200_000_000  # cycles: about 0.1 s


def step_of(loss_fn: FusedBiasLoss) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(features: Tensor, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_fn(features, output, target)
        return loss.detach(), torch.autograd.grad(loss, output)[0]

    return step


@pytest.fixture
def no_waiting(gpu: torch.device) -> Iterator[None]:
    """Any wait of the host for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_waits_for_nothing(
    backend: str, device: torch.device, gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    loss_fn = FusedBiasLoss(backend=backend).to(device)
    features, (output, target) = make_features(MAPS, device), make_scores(MAPS[0], CLASSES, device)
    step_of(loss_fn)(features, output, target)  # compiles, loads
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        step_of(loss_fn)(features, output, target)
        functional.feature_variance(features, backend=backend)


def test_waiting_would_be_noticed(device: torch.device, no_waiting: None) -> None:
    with pytest.raises(RuntimeError):
        torch.ones(1, device=device).item()


def test_runs_on_the_current_stream(backend: str, device: torch.device, gpu: torch.device) -> None:
    loss_fn = FusedBiasLoss(backend=backend).to(device)
    features, (output, target) = make_features(MAPS, device), make_scores(MAPS[0], CLASSES, device)
    loss_fn.eval()
    expected = step_of(loss_fn)(features, output, target)
    late = torch.zeros_like(features)
    late_output = torch.zeros_like(output).requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        late.copy_(features)
        with torch.no_grad():
            late_output.copy_(output)
        found = step_of(loss_fn)(late, late_output, target)
        variance = functional.feature_variance(late, backend=backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(variance, functional.feature_variance(features, backend=backend))


def test_a_cuda_graph_replays_the_step_with_new_data(backend: str, device: torch.device, gpu: torch.device) -> None:
    captured, eager = FusedBiasLoss(backend=backend).to(device), FusedBiasLoss(backend=backend).to(device)
    features, (output, target) = make_features(MAPS, device), make_scores(MAPS[0], CLASSES, device)
    step = step_of(captured)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(features, output, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step(features, output, target)
    captured.reset_running_min()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            features.copy_(torch.randn_like(features) * (torch.rand(MAPS[0], 1, 1, 1, device=device) + 0.5))
            output.copy_(torch.randn_like(output))
            target.copy_(torch.randint_like(target, CLASSES))
        graph.replay()
        expected = step_of(eager)(features, output, target)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])
        assert torch.equal(captured.running_min, eager.running_min)


def test_the_same_bits_every_time(backend: str, device: torch.device) -> None:
    samples = 6 if simulated() else 128
    features = make_features((samples, 960, 7, 7), device, torch.bfloat16, channels_last=True)
    output, target = make_scores(samples, 1000, device, torch.bfloat16)
    first = step_of(FusedBiasLoss(backend=backend).to(device))(features, output, target)
    for _ in range(3 if simulated() else 20):
        again = step_of(FusedBiasLoss(backend=backend).to(device))(features, output, target)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_streams_at_once_do_not_disturb_each_other(backend: str, device: torch.device, gpu: torch.device) -> None:
    features = [make_features((256, 300 + index, 7, 7), device) for index in range(4)]
    expected = [functional.feature_variance(maps, backend=backend) for maps in features]
    scores = [make_scores(256, CLASSES + index, device) for index in range(4)]
    losses = [FusedBiasLoss(backend=backend).to(device).eval() for _ in range(4)]
    values = [step_of(loss)(maps, *s) for loss, maps, s in zip(losses, features, scores, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found: list[list[Tensor]] = [[] for _ in range(4)]
    for _ in range(10):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[index].append(functional.feature_variance(features[index], backend=backend))
                found[index].append(step_of(losses[index])(features[index], *scores[index])[0])
    torch.cuda.synchronize()
    for index, results in enumerate(found):
        assert all(torch.equal(variance, expected[index]) for variance in results[0::2])
        assert all(torch.equal(loss, values[index][0]) for loss in results[1::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_loss_in_float32(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    loss_fn = FusedBiasLoss(backend=backend).to(device)
    layer = nn.Linear(20, CLASSES).to(device)
    features, target = make_features((16, 20), device), make_scores(16, CLASSES, device)[1]
    with torch.autocast(device.type, dtype):
        output = layer(features)
        assert output.dtype == dtype
        loss = loss_fn(features, output, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
    exact = FusedBiasLoss(backend="reference").to(device)(features.double(), output.detach().double(), target)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=2e-5, atol=0)


def test_torch_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    loss_fn = FusedBiasLoss(backend=backend).to(device)
    features, (output, target) = make_features(MAPS, device), make_scores(MAPS[0], CLASSES, device)
    expected = step_of(loss_fn)(features, output, target)
    loss_fn.reset_running_min()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager" if simulated() else "inductor")
    loss = compiled(features, output, target)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, output)[0], expected[1], rtol=1e-5, atol=1e-9)


def test_a_second_gpu_while_the_first_is_current(backend: str, device: torch.device, gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        features, (output, target) = make_features(MAPS, other), make_scores(MAPS[0], CLASSES, other)
        found = step_of(FusedBiasLoss(backend=backend).to(other))(features, output, target)
    expected = step_of(FusedBiasLoss(backend="reference").to(other))(features, output, target)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


@pytest.fixture
def nccl(tmp_path: Path, gpu: torch.device) -> Iterator[None]:
    """A process group of one."""
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_nccl_group_of_one_gives_what_no_group_gives(backend: str, device: torch.device, nccl: None) -> None:
    features, (output, target) = make_features(MAPS, device), make_scores(MAPS[0], CLASSES, device)
    alone = FusedBiasLoss(backend=backend).to(device)
    grouped = FusedBiasLoss(backend=backend, process_group=dist.group.WORLD).to(device)
    expected, found = step_of(alone)(features, output, target), step_of(grouped)(features, output, target)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grouped.running_min, alone.running_min, rtol=1e-6, atol=0)


def test_distributed_data_parallel_over_nccl(backend: str, device: torch.device, nccl: None) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(20, CLASSES).to(device)
    parallel = nn.parallel.DistributedDataParallel(nn.Linear(20, CLASSES).to(device), device_ids=[device.index])
    parallel.module.load_state_dict(plain.state_dict())
    features, target = make_features((16, 20), device), make_scores(16, CLASSES, device)[1]
    for model, group in ((plain, None), (parallel, dist.group.WORLD)):
        loss_fn = FusedBiasLoss(backend=backend, process_group=group).to(device)
        loss_fn(features, model(features), target).backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(parallel.module.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-8)
