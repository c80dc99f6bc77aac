"""`optimize_for_inference(model, dtype=torch.int8, ...)`: scores near those of float32, the same bits however it is run."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from biasloss_ext import optimize_for_inference, quantization_report
from biasloss_ext.models import skipblocknet_xs
from biasloss_ext.ops import backends
from biasloss_ext.ops.native import native
from biasloss_ext.ops.program import reference
from tests.networks import MODELS, network
from tests.nn import lookalikes

HAS_KERNELS = backends.why_not("cpu", torch.device("cpu"), "program") is None and bool(native().build.get("cpu_int8"))
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="this CPU or build has no int8 kernels")


def images(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def quantized() -> Any:
    return quantize(network())


def quantize(model: nn.Module, calibrate_on: Any = None) -> Any:
    return optimize_for_inference(
        model, dtype=torch.int8, calibrate_on=images(4, 3, 64, 64, seed=2) if calibrate_on is None else calibrate_on
    )


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_near(name: str) -> None:
    """At sizes that vary, in both memory formats, and for any number of threads."""
    model, threads = MODELS[name](), torch.get_num_threads()
    quantized = quantize(model)
    for size in ((1, 3, 64, 64), (3, 3, 75, 50)):
        x = images(*size)
        ours, exact = quantized(x), model(x)
        assert (ours - exact).norm() < 0.06 * exact.norm()
        assert torch.equal(quantized(x.contiguous(memory_format=torch.channels_last)), ours)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(quantized(x), ours)
        finally:
            torch.set_num_threads(threads)


def of_one_block(activation: nn.Module, kernel: int, stride: int = 1, channels: int = 16) -> nn.Module:
    block = lookalikes.TorchvisionV3(channels, 40, channels, kernel, stride)
    for layers in (block.block[0], block.block[1]):
        layers[2] = activation
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.Hardswish(), block, *end).eval()


@needs_kernels
@settings(max_examples=12, deadline=None)
@given(
    kernel=st.sampled_from([3, 5, 7]),
    stride=st.integers(1, 2),
    channels=st.integers(2, 39),
    activation=st.sampled_from([nn.ReLU(), nn.ReLU6(), nn.Hardswish()]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_the_reference_computes_the_same_bytes(
    kernel: int, stride: int, channels: int, activation: nn.Module, size: tuple[int, int]
) -> None:
    """Of networks without exponentials."""
    quantized, x = quantize(of_one_block(activation, kernel, stride, channels)), images(2, 3, *size)
    (segment,) = quantized.forward.made.segments
    assert set(quantization_report(quantized).float32) == set()
    assert torch.equal(quantized(x), reference.program(x, segment.constants, segment.code))


@needs_kernels
def test_what_rounding_shifts_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images that are one color but for a corner."""
    model = network()
    calibrate_on, x = (torch.full((24, 3, 48, 48), -0.7) for _ in range(2))
    for seed, of in enumerate((calibrate_on, x)):
        of[..., :16, :16] = images(24, 3, 16, 16, seed=seed)
    exact = model(x)

    def shift() -> float:
        return (quantize(model, calibrate_on)(x) - exact).mean(0).norm().item()

    corrected = shift()
    monkeypatch.setattr("biasloss_ext.nn.quantization.program.corrections", lambda *_: {})
    assert corrected < 0.5 * shift()


def digits() -> tuple[Tensor, Tensor]:
    """Images of 32 x 32, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    values = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(values, size=32).expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


@needs_kernels
@pytest.mark.slow
@pytest.mark.thorough
def test_a_trained_network_agrees() -> None:
    """Top 1 of at least 99 of 100 images that were not trained on."""
    torch.manual_seed(0)
    x, target = digits()
    order = torch.randperm(len(x))
    train, test = order[:1300], order[1300:]
    model = skipblocknet_xs(10, small_input=True, drop_rate=0.0)
    epochs, batch = 6, 50
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * 26)
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in train[torch.randperm(len(train))].split(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), target[chosen]).backward()
                optimizer.step()
                schedule.step()
    exact = model.eval()(x[test]).argmax(1)
    assert (exact == target[test]).double().mean() > 0.9
    loader = DataLoader(TensorDataset(x[train], target[train]), batch_size=64)
    ours = quantize(model, loader)(x[test]).argmax(1)
    assert (ours == exact).double().mean() >= 0.99


@needs_kernels
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same(quantized: Any, copied: Callable[[Any], Any]) -> None:
    x = images(1, 3, 64, 64)
    assert torch.equal(copied(quantized)(x), quantized(x))


@needs_kernels
@pytest.mark.skipif(native().build.get("cpu_int8") == "AVX2", reason="no other instruction set")
def test_avx2_computes_the_same_bits(tmp_path: Path) -> None:
    """Of models that were quantized here, for every activation."""
    activations = (nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish(), nn.ReLU6())
    models = [quantize(network()), *(quantize(of_one_block(activation, 7)) for activation in activations)]
    x = images(2, 3, 75, 50)
    segments = [segment for model in models for segment in model.forward.made.segments]
    programs = [(segment.constants, segment.code) for segment in segments]
    torch.save((x, programs), tmp_path / "programs.pt")
    code = (
        "import sys, torch, biasloss_ext\n"
        "from biasloss_ext.ops.registry import OPS\n"
        "x, programs = torch.load(sys.argv[1])\n"
        "torch.save([OPS['program'](x, *program, backend='cpu') for program in programs], sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "programs.pt"), str(tmp_path / "results.pt")]
    subprocess.run(arguments, env={**os.environ, "BIASLOSS_CPU_ISA": "avx2"}, check=True)
    for model, there in zip(models, torch.load(tmp_path / "results.pt"), strict=True):
        assert torch.equal(model(x), there)


@needs_kernels
def test_ways_to_give_images() -> None:
    model, x = lookalikes.network().eval(), images(40, 3, 32, 32)
    expected = quantize(model, x)(x[:2])
    assert torch.equal(quantize(model, [x[:32], x[32:]])(x[:2]), expected)
    loader = DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=32)
    assert torch.equal(quantize(model, loader)(x[:2]), expected)


class Around(nn.Module):
    """A network with layers that no program has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = lookalikes.network()[:4]
        self.middle = nn.Sequential(nn.PReLU(), nn.MaxPool2d(2))
        self.rest = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 7, 1, 3, groups=24))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.rest(self.middle(self.first(x)))
        return result


@needs_kernels
def test_layers_between_programs() -> None:
    """They stay in float32, and the report names them; a dense convolution of many channels runs on bytes."""
    model = Around().eval()
    quantized, x = quantize(model), images(2, 3, 64, 48)
    exact = model(x)
    assert (quantized(x) - exact).norm() < 0.1 * exact.norm()
    report = quantization_report(quantized)
    assert report.int8["1x1 and dense convolutions"] > 3
    assert "middle_0" in report.outside
    assert "middle_1" in report.outside
    assert str(report).startswith("int8: ")


@needs_kernels
def test_what_it_cannot_do_raises(quantized: Any) -> None:
    x = images(1, 3, 64, 64)
    for wrong in (x.double(), x.half()):
        with pytest.raises(RuntimeError, match="expects one float32 tensor of images on the CPU"):
            quantized(wrong)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="it has no gradients"):
        quantized(x.clone().requires_grad_())
    with torch.enable_grad():
        assert not quantized(x).requires_grad
    with pytest.raises(RuntimeError, match="can be neither compiled nor exported"):
        torch.func.vmap(quantized)(x[None])
    with pytest.raises(RuntimeError, match="cannot load a state_dict"):
        quantized.load_state_dict(network().state_dict())
    handle = quantized.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks on its layers would not be called"):
        quantized(x)
    handle.remove()
    changed = copy.deepcopy(quantized)
    changed(x)
    changed.classifier[1] = nn.ReLU()
    with pytest.raises(RuntimeError, match="changed since its calibration"):
        changed(x)


@needs_kernels
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": torch.int8}, ValueError, "needs calibrate_on"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.int8 or None, got torch.float16"),
        ({"calibrate_on": images(1, 3, 8, 8)}, ValueError, "calibrate_on is for dtype=torch.int8 alone"),
        ({"dtype": torch.int8, "calibrate_on": []}, ValueError, "calibrate_on has no images"),
        ({"dtype": torch.int8, "calibrate_on": images(0, 3, 64, 64)}, ValueError, "calibrate_on has no images"),
        ({"dtype": torch.int8, "calibrate_on": ["cat.jpg"]}, TypeError, "must yield tensors of images.*got str"),
        ({"dtype": torch.int8, "calibrate_on": images(1, 3, 64, 64) / 0}, ValueError, "not finite"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize_for_inference(network(), **options)


@needs_kernels
def test_a_model_without_such_layers() -> None:
    with pytest.raises(ValueError, match="no layers of the model have int8 kernels"):
        quantize(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), images(1, 3, 2, 2))


def test_a_report_needs_a_quantized_model() -> None:
    with pytest.raises(ValueError, match="must come from optimize_for_inference"):
        quantization_report(nn.ReLU())


@pytest.mark.skipif(backends.why_not("cpu", torch.device("cpu"), "program") is not None, reason="needs the kernels")
def test_a_cpu_without_int8() -> None:
    """In one sentence, that says what there is."""
    code = (
        "import torch, biasloss_ext\n"
        "biasloss_ext.optimize_for_inference(torch.nn.Conv2d(3, 8, 3), dtype=torch.int8, calibrate_on=torch.ones(1, 3, 8, 8))"
    )
    environment = {**os.environ, "BIASLOSS_CPU_ISA": "baseline"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "RuntimeError: dtype torch.int8 is not supported here: it needs a CPU with AVX2, and this process runs baseline kernels; "
        "there are torch.float32 and torch.float64"
    )
