"""Every op's own benchmarks at tiny sizes: all contenders run here, are right, or say why not. No timing decides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from typer.testing import CliRunner

from biasloss_ext import models
from biasloss_ext.benchmarks import block_shapes, engine, results, shapes, skipblocknet
from biasloss_ext.benchmarks.ops import NETWORKS, OF_NETWORKS, OPS
from biasloss_ext.benchmarks.peers.compiled import compiled
from biasloss_ext.cli import _app
from biasloss_ext.nn import SqueezeExcite
from biasloss_ext.ops import registry

ROOT = Path(__file__).resolve().parents[2]
# Not everywhere installed, or for GPUs. Nobody else may be missing.
MAY_BE_MISSING = {
    "Liger cross_entropy",
    "torchvision MobileNetV3-Large",
    "MobileNetV3-Large, accelerate",
    "ONNX Runtime",
    "OpenVINO",
    "ncnn",
}


# The other network for small images differs from the first in widths alone.
RUN = [op for op in OPS if op not in shapes.SMALL_IMAGES[1:]]


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces but generates no code, which would take minutes; and one thread."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: real(function, backend="eager"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not traced either, which tests/models/test_deployment.py has; and exported once for both runtimes."""
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    real = torch.onnx.export
    programs: dict[torch.Size, Any] = {}

    def export(model: nn.Module, inputs: tuple[torch.Tensor], **options: Any) -> Any:
        if inputs[0].shape not in programs:
            programs[inputs[0].shape] = real(model, inputs, **options)
        return programs[inputs[0].shape]

    monkeypatch.setattr(torch.onnx, "export", export)


@pytest.mark.parametrize(
    "op",
    [pytest.param(op, marks=(pytest.mark.slow, pytest.mark.thorough)) if op == "skipblocknet" else op for op in RUN],
)
def test_every_contender_runs_or_says_why_not(
    op: str, tmp_path: Path, quick_compiler: None, one_thread: None, request: pytest.FixtureRequest
) -> None:
    if op in NETWORKS:
        request.getfixturevalue("quick_network")
    done = CliRunner().invoke(_app(), ["bench", "--tiny", "--device", "cpu", "--ops", op, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    found = results.load(tmp_path / results.FILE_NAME)
    workloads = shapes.workloads(op, "cpu", tiny=True)
    assert [group.name for group in found.groups] == [workload.name for workload in workloads]
    for group, workload in zip(found.groups, workloads, strict=True):
        assert len(group.entries) == sum(contender.takes_part(workload) for contender in OPS[op].contenders)
        for entry in group.entries:
            if entry.status == "unavailable":
                assert entry.reason
                assert entry.name in MAY_BE_MISSING, f"{entry.name}: {entry.reason}"
            else:
                assert (entry.status, entry.reason) == ("ok", ""), f"{group.name}, {entry.name}"
                assert len(entry.wall) == engine.TINY.visits
        assert group.name in done.output
    assert list(tmp_path.glob("memory-*.png"))


@pytest.mark.parametrize("op", RUN)
def test_our_steps_take_the_workloads_of_a_gpu(op: str, one_thread: None) -> None:
    """In their dtypes, which differ from those of the CPU's workloads, and agree with float64."""
    device = torch.device("cpu")
    for workload in shapes.workloads(op, "cuda", tiny=True):
        for contender in OPS[op].contenders:
            if contender.role == "ours" and contender.takes_part(workload):
                engine.prepare(OPS[op], contender, workload, device)


def test_every_family_of_ops_has_a_benchmark() -> None:
    assert {op.family for op in registry.OPS.values()} | {*NETWORKS} == {*OPS, *OF_NETWORKS}


def test_compare_of_two_files(tmp_path: Path, quick_compiler: None) -> None:
    arguments = ["bench", "--tiny", "--ops", "feature_variance", "--device", "cpu"]
    for name in ("a", "b"):
        assert CliRunner().invoke(_app(), [*arguments, "--out", str(tmp_path / name)]).exit_code == 0
    files = [str(tmp_path / name / results.FILE_NAME) for name in ("a", "b")]
    done = CliRunner().invoke(_app(), ["bench", "--compare", *files])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "changes of time, wall" in done.output
    assert "atio" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "bias_loss,typo"], "--ops has typo; there are batch_norm, bias_loss"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda, got tpu"),
        (["--compare", "nowhere.json", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_what_the_user_got_wrong_is_told_in_a_sentence(arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "biasloss_ext", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"biasloss: {said}")


@pytest.mark.slow
@pytest.mark.thorough
def test_pytest_benchmark_reports_what_the_engine_measures() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--tiny", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    selected = "not skipblocknet and not compile"
    # pytest-benchmark refuses to time inside a worker of pytest-xdist, which the child is not, whatever this process is.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, "-k", selected], capture_output=True, text=True, check=False, cwd=ROOT, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    for op in set(OPS) - {*NETWORKS}:
        for workload in shapes.workloads(op, "cpu", quick=True, tiny=True):
            assert f"benchmark '{workload.name}'" in done.stdout


def test_the_table_has_the_network_s_blocks() -> None:
    model = skipblocknet.plain(10).eval()  # fused blocks call no Conv2d
    convolutions: list[tuple[int, int, int, int, int]] = []
    gates: set[tuple[int, int]] = set()

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            size = inputs[0].shape[2]
            convolutions.append((layer.in_channels, layer.out_channels, size, layer.kernel_size[0], layer.stride[0]))
        elif isinstance(layer, SqueezeExcite):
            gates.add((inputs[0].shape[1], layer.fc[0].out_features))

    for layer in model.modules():
        layer.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    found = {
        (first[0], *depthwise[1:], project[1])
        for first, depthwise, project in zip(convolutions, convolutions[1:], convolutions[2:], strict=False)
        if depthwise[0] == depthwise[1] and depthwise[3] > 1
    }
    assert {tuple(block[:6]) for block in block_shapes.BLOCKS} == found
    assert {(block.expanded, block.hidden) for block in block_shapes.BLOCKS if block.hidden} == gates
    assert set(block_shapes.QUICK_BLOCKS) <= set(block_shapes.BLOCKS)


@pytest.mark.parametrize("op", shapes.SMALL_IMAGES)
def test_small_images_are_trained_on_in_batches_of_128(op: str) -> None:
    (workload,) = shapes.workloads(op, "cpu")
    assert (workload.batch, workload.sample, workload.backward) == (128, (3, 32, 32), True)
    with torch.device("meta"):
        network = getattr(models, op.removesuffix("_small"))(workload.classes, small_input=True)
    assert OPS[op].cost(workload).flops == 3 * 2 * 128 * models.count_multiply_adds(network, workload.sample)
    names = [contender.name for contender in OPS[op].contenders]
    assert names == ["biasloss_ext, fused", "eager NCHW", "eager channels_last", "torch.compile"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads_have_names_of_their_own(op: str, device: str) -> None:
    for options in ({}, {"quick": True}, {"tiny": True}):
        listed = shapes.workloads(op, device, **options)
        assert len({workload.name for workload in listed}) == len(listed)


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x * x.shape[0]


@pytest.mark.parametrize("function", [_scaled, nn.Conv2d(2, 2, 1)], ids=["function", "module"])
def test_compiled_functions_do_not_learn_of_each_other_s_sizes(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: real(function, backend=counter))
    for size in range(3, 6):
        call = compiled(function, "default")
        call(torch.ones(size, 2, 4, 4))
        call(torch.ones(size, 2, 4, 4))
    assert counter.frame_count == 3
    for graph in counter.graphs:
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        assert not any(isinstance(node.meta["example_value"], torch.SymInt) for node in placeholders)
