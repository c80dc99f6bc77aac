"""The tests of ops, loss and layers on a simulated GPU, in processes of their own: the launchers of the CUDA kernels, as they
are, on a machine without a GPU. By hand, from the root of the checkout:

    export BIASLOSS_SIMULATED_GPU=$(python -m tests.cudasim.simulated_gpu)
    python -m pytest -p tests.cudasim.on_simulated_gpu tests/ops/test_depthwise.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cudasim import sanitizers, simulated_gpu

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = os.environ.get("BIASLOSS_TEST_SIMULATED") == "1"  # `make test-simulated`
FILES = {
    "device": ("tests/simulated_gpu",),
    "ops": (
        "tests/ops/test_bias_loss.py",
        "tests/ops/test_bias_loss_edge_cases.py",
        "tests/ops/test_depthwise.py",
        "tests/ops/test_feature_variance.py",
        "tests/ops/test_registry.py",
    ),
    "layers": ("tests/test_loss.py", "tests/nn/test_depthwise_conv.py", "--whole=test_loss.py"),
}
OPTIONS = ("-q", "-x", "-p", "tests.cudasim.on_simulated_gpu", "-p", "no:cacheprovider", "-W", "ignore")
pytestmark = pytest.mark.usefixtures("compilers")


@pytest.fixture(scope="session")
def library(compilers: None) -> Path:
    return simulated_gpu.build()


def variables(library: Path, **settings: int) -> dict[str, str]:
    return {
        "BIASLOSS_SIMULATED_GPU": str(library),
        **{f"BIASLOSS_SIMULATED_{name.upper()}": str(value) for name, value in settings.items()},
    }


# Tests that take long on the simulated GPU, and say little more there than others.
SLOW = "not symbolic and not schema and not test_depthwise_on_gpu and not without_graph_breaks"


def run_tests(*arguments: str, environment: dict[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# In order on a large device, and in a random order on a small one.
IN_EVERY_RUN = (("device", 7, 3), ("ops", 0, 132), ("layers", 0, 132))


@pytest.mark.slow
@pytest.mark.parametrize(("files", "seed", "multiprocessors"), IN_EVERY_RUN)
def test_on_the_simulated_gpu(library: Path, files: str, seed: int, multiprocessors: int) -> None:
    """What the launchers leave uninitialized holds NaN."""
    few = () if EVERYTHING else ("--examples=10", "-k", SLOW)
    environment = variables(library, seed=seed, multiprocessors=multiprocessors)
    run_tests(*FILES[files], *few, "--fill-with-nan", environment=environment)


@pytest.mark.slow
def test_the_tests_for_a_gpu(library: Path) -> None:
    few = () if EVERYTHING else ("-k", SLOW)
    run_tests("tests/gpu", *few, environment=variables(library, multiprocessors=3))


@pytest.mark.slow
@pytest.mark.skipif(not EVERYTHING, reason="takes minutes; `make test-simulated` runs it")
@pytest.mark.parametrize("multiprocessors", [3, 132])
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("files", FILES)
def test_every_schedule(library: Path, files: str, seed: int, multiprocessors: int) -> None:
    run_tests(*FILES[files], environment=variables(library, seed=seed, multiprocessors=multiprocessors))


FRONT_DOOR = """
import torch
import torch.nn.functional as F
from biasloss_ext import FusedBiasLoss, functional
torch.manual_seed(0)
features, output, target = torch.randn(8, 6, 5, 5), torch.randn(8, 10, requires_grad=True), torch.arange(8)
x, weight = torch.randn(2, 8, 9, 7, requires_grad=True), torch.randn(8, 1, 5, 5)
exact = FusedBiasLoss(backend="reference")(features.double(), output.double(), target)
(gradient,) = torch.autograd.grad(exact, output)
convolved = F.conv2d(x.double(), weight.double(), padding=2, stride=2, groups=8)
(back,) = torch.autograd.grad(convolved.sum(), x)
for options in ({}, {"backend": "cuda"}, {"backend": "auto"}):
    loss = FusedBiasLoss(**options)(features, output, target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, output)[0], gradient, rtol=1e-4, atol=1e-7)
    variance = functional.feature_variance(features, **options)
    torch.testing.assert_close(variance.double(), features.double().var((1, 2, 3)), rtol=1e-5, atol=0)
    y = functional.depthwise_conv2d(x, weight, None, 2, **options)
    torch.testing.assert_close(y.double(), convolved, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], back, rtol=1e-5, atol=1e-5)
from tests.cudasim.simulated_gpu import Simulator
assert len(Simulator().take_launches()) == 15, "five a turn"
"""


def test_the_front_door_with_nothing_but_the_variable(library: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BIASLOSS_")}
    environment = {**inherited, "BIASLOSS_SIMULATED_GPU": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", FRONT_DOOR],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_networks_on_simulated_kernels_and_interpreted_triton(library: Path) -> None:
    """What a GPU would take, by the public API: every op, and a training step and inference of networks. SkipblockNet-XS takes
    two minutes."""
    pytest.importorskip("triton")
    chosen = "cuda" if EVERYTHING else "cuda and not skipblocknet"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_front_door.py", "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "BIASLOSS_SIMULATED_GPU": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{2 + EVERYTHING} passed" in done.stdout


@pytest.mark.slow
@pytest.mark.thorough
def test_replayed_blocks(library: Path) -> None:
    pytest.importorskip("triton")
    environment = {**variables(library), "TRITON_INTERPRET": "1"}
    files = "tests/triton_interpreter/test_chain_replay.py"
    run_tests(files, f"--whole={Path(files).name}", "--fill-with-nan", environment=environment)


def test_a_library_that_does_not_exist_is_named() -> None:
    code = "import biasloss_ext; biasloss_ext.FusedBiasLoss(backend='cuda')(*[__import__('torch').ones(2, 2)] * 3)"
    environment = {**os.environ, "BIASLOSS_SIMULATED_GPU": "/nowhere/gpu.so"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "BIASLOSS_SIMULATED_GPU names /nowhere/gpu.so, which does not exist" in done.stderr


# The tests that reach every branch of index arithmetic; the rest only vary values.
UNDER_SANITIZERS = (
    "test_rows_cut or test_positions_shared or test_scores_aligned or test_classes_side_by_side or test_variance_of or "
    "(test_agrees_with_float64 and depthwise) or test_class_out_of_range"
)


@pytest.mark.slow
@pytest.mark.thorough
def test_launchers_under_sanitizers(compilers: None) -> None:
    """Every tensor of torch is an allocation of its own, with red zones around it."""
    sanitizers.runtime("libasan.so")
    environment = variables(simulated_gpu.build(sanitize=True))
    files = ("tests/simulated_gpu", "tests/ops/test_bias_loss_edge_cases.py", "tests/ops/test_registry.py")
    done = sanitizers.run("-m", "pytest", *OPTIONS, "-s", *files, "-k", UNDER_SANITIZERS, folder=ROOT, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
