"""DepthwiseConv2d where the class name is all that was replaced: what else meets an nn.Conv2d, and errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

from biasloss_ext import functional
from biasloss_ext.nn import DepthwiseConv2d

KERNEL = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 8}
LAYERS = {
    "on the kernels": {},
    "stride 2": {"stride": 2},
    "same": {"padding": "same"},
    "dilated": {"dilation": 2, "padding": 2},
    "reflect": {"padding_mode": "reflect"},
    "named": {"backend": "cpu"},
}
layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def pair_of(options: dict[str, Any]) -> tuple[DepthwiseConv2d, nn.Conv2d]:
    """Ours and PyTorch's, from one seed."""
    torch.manual_seed(0)
    ours = DepthwiseConv2d(**{**KERNEL, **options})
    torch.manual_seed(0)
    return ours, nn.Conv2d(**{**KERNEL, **{name: value for name, value in options.items() if name != "backend"}})


def images() -> Tensor:
    return torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1))


def test_the_signature_is_that_of_conv2d() -> None:
    ours, theirs = (inspect.signature(kind).parameters for kind in (DepthwiseConv2d, nn.Conv2d))
    assert list(ours) == [*theirs, "backend"]
    assert [ours[name].default for name in theirs] == [parameter.default for parameter in theirs.values()]
    assert ours["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    positional = DepthwiseConv2d(8, 8, 3, 2, 1, 1, 8, False, "zeros", "cpu", torch.float64)
    assert repr(positional) == repr(nn.Conv2d(8, 8, 3, 2, 1, 1, 8, False)).replace("Conv2d", "DepthwiseConv2d")
    assert positional.weight.dtype == torch.float64
    assert repr(DepthwiseConv2d(8, 8, 3, backend="reference")).endswith(", backend='reference')")


@layers
def test_state_and_random_numbers_are_those_of_conv2d(options: dict[str, Any]) -> None:
    ours, plain = pair_of(options)
    assert isinstance(ours, nn.Conv2d)
    for source, target in ((ours, plain), (plain, ours)):
        assert list(source.state_dict()) == list(target.state_dict())
        for mine, other in zip(source.parameters(), target.parameters(), strict=True):
            assert torch.equal(mine, other)
        with torch.no_grad():
            source.weight.mul_(2)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(ours(images()), plain(images()))
    torch.manual_seed(5)
    ours.reset_parameters()
    torch.manual_seed(5)
    plain.reset_parameters()
    assert torch.equal(ours.weight, plain.weight)


@layers
def test_copies(options: dict[str, Any]) -> None:
    ours, _ = pair_of(options)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(copied) == repr(ours)
        assert torch.equal(copied(images()), ours(images()))


@layers
def test_recorded_graphs_hold_plain_pytorch(options: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = pair_of(options)
    x, saved = images(), io.BytesIO()
    scripted = torch.jit.script(nn.Sequential(ours, nn.ReLU()))
    torch.jit.save(scripted, saved)
    saved.seek(0)
    torch.testing.assert_close(torch.jit.load(saved)(x), plain(x).relu())
    traced, of_fx = torch.jit.trace(ours, x), torch.fx.symbolic_trace(nn.Sequential(ours))
    exported = torch.export.export(ours, (x,))
    for graph, module in (
        (scripted.inlined_graph, None),
        (traced.inlined_graph, traced),
        (of_fx.graph, of_fx),
        (exported.graph, exported.module()),
    ):
        assert "biasloss_ext::" not in str(graph)
        assert "biasloss_ext.depthwise" not in str(graph)
        if module is not None:
            torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript, which is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    ours, plain = pair_of({"stride": 2})
    file = tmp_path / "layer.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about its dependencies
        torch.onnx.export(ours, (images(),), file, dynamo=dynamo, verbose=False, input_names=["x"])
    (y,) = runtime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": images().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), plain(images()).detach(), rtol=1e-4, atol=1e-5)


def test_functional_in_recorded_graphs() -> None:
    weight = torch.randn(8, 1, 5, 5)
    traced = torch.fx.symbolic_trace(lambda x, weight: functional.depthwise_conv2d(x, weight, None, (2, 2)))
    expected = F.conv2d(images(), weight, stride=2, padding=2, groups=8)
    torch.testing.assert_close(traced(images(), weight), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_meta_and_fake_tensors(backend: str) -> None:
    layer = DepthwiseConv2d(**KERNEL, stride=2, device="meta", backend=backend)
    y = layer(torch.empty(2, 8, 9, 7, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 8, 5, 4))
    with FakeTensorMode():
        fake = DepthwiseConv2d(**KERNEL, backend=backend)(torch.empty(2, 8, 9, 7))
    assert fake.shape == (2, 8, 9, 7)


def test_transforms_of_torch_func() -> None:
    ours, plain = pair_of({})

    def per_sample(layer: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))
        found: dict[str, Tensor] = gradients(dict(layer.named_parameters()), images())
        return found

    def pushed_forward(layer: nn.Module) -> Tensor:
        with forward_ad.dual_level():
            tangent: Tensor = forward_ad.unpack_dual(layer(forward_ad.make_dual(images(), images()))).tangent
            return tangent

    def directional(layer: nn.Module) -> Tensor:
        found: Tensor = torch.func.jvp(layer, (images(),), (images(),))[1]
        return found

    torch.testing.assert_close(per_sample(ours), per_sample(plain))
    torch.testing.assert_close(pushed_forward(ours), pushed_forward(plain))
    torch.testing.assert_close(directional(ours), directional(plain))
    compiled = torch.compile(torch.func.vmap(torch.func.grad(lambda x: ours(x).square().sum())), backend="aot_eager")
    torch.testing.assert_close(compiled(images()), torch.func.grad(lambda x: plain(x).square().sum())(images()))
    torch.testing.assert_close(per_sample(pair_of({"backend": "reference"})[0]), per_sample(plain))
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run under torch\.func"):
        directional(DepthwiseConv2d(**KERNEL, backend="cpu"))


def test_complex_numbers_and_subclasses_of_tensors() -> None:
    class Image(Tensor):
        pass

    ours, plain = pair_of({})
    assert torch.equal(ours(images().as_subclass(Image)).as_subclass(Tensor), plain(images()))
    ours, plain = pair_of({"dtype": torch.complex64})
    assert torch.equal(ours(images().to(torch.complex64)), plain(images().to(torch.complex64)))


@pytest.mark.parametrize(
    ("options", "objection"),
    [
        ({"kernel_size": 4, "padding": 2}, r"kernel_size=\(4, 4\)"),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, r"kernel_size=\(3, 5\)"),
        ({"stride": 3}, r"stride=\(3, 3\)"),
        ({"stride": (1, 2)}, r"stride=\(1, 2\)"),
        ({"padding": 0}, r"padding=\(0, 0\)"),
        ({"padding": "valid"}, "padding='valid'"),
        ({"dilation": 2, "padding": 2}, r"padding=\(2, 2\), dilation=\(2, 2\)"),
        ({"padding_mode": "circular"}, "padding_mode='circular'"),
        ({"out_channels": 16}, "in_channels=8, out_channels=16, groups=8"),
        ({"groups": 4}, "in_channels=8, out_channels=8, groups=4"),
        ({"dtype": torch.complex64}, r"dtype=torch\.complex64"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_named_backends_refuse_what_they_have_no_kernel_for(
    options: dict[str, Any], objection: str, backend: str
) -> None:
    sentence = f"^backend '{backend}' has no kernel for {objection}; supported: .*Use backend='auto'"
    with pytest.raises(ValueError, match=sentence):
        DepthwiseConv2d(**{**KERNEL, **options}, backend=backend)
    of_plain_pytorch, plain = pair_of({**options, "backend": "reference"})
    x = images().to(plain.weight.dtype)
    assert torch.equal(of_plain_pytorch(x), plain(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [("dilation", (2, 2)), ("dilation", 2), ("padding", (0, 0)), ("padding", 0), ("stride", [3, 3]), ("stride", 2)],
)
def test_a_changed_module_computes_what_it_says(name: str, value: Any) -> None:
    ours, plain = pair_of({})
    for module in (ours, plain):
        setattr(module, name, value)
    torch.testing.assert_close(ours(images()), plain(images()))
    ours.backend = "cpu"
    if (name, value) == ("stride", 2):
        torch.testing.assert_close(ours(images()), plain(images()))
        return
    with pytest.raises(ValueError, match=f"backend 'cpu' has no kernel for {name}="):
        ours(images())


def test_same_padding_is_that_of_the_kernels_at_stride_one_alone() -> None:
    ours, plain = pair_of({"padding": "same", "backend": "cpu"})
    torch.testing.assert_close(ours(images()), plain(images()))
    ours.backend, ours.stride, plain.stride = "auto", (2, 2), (2, 2)
    for module in (plain, ours):
        with pytest.raises(RuntimeError, match="strided convolutions"):
            module(images())


def test_unknown_and_missing_backends() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'; there are: auto, reference, cpu, cuda, triton"):
        DepthwiseConv2d(**KERNEL, backend="gpu")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: depthwise has no triton kernels"):
        DepthwiseConv2d(**KERNEL, backend="triton")(images())


def test_inputs_of_another_kind_are_errors() -> None:
    conv = DepthwiseConv2d(**KERNEL)
    with pytest.raises(ValueError, match="x has 7 channels, weight has 8"):
        conv(torch.randn(1, 7, 4, 4))
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\) or \(C, H, W\), got \(8, 4\)"):
        conv(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"x must have a height and a width of at least 1, got \(1, 8, 0, 4\)"):
        conv(torch.randn(1, 8, 0, 4))
    with pytest.raises(TypeError, match="x must be float16"):
        conv(torch.ones(1, 8, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, weight is torch\.float32: convert one"):
        conv(images().bfloat16())


@pytest.mark.parametrize("stride", [(2, 2), [2, 2], torch.Size((2, 2)), (2,), 2])
def test_strides_of_the_function(stride: Any) -> None:
    weight = torch.randn(8, 1, 3, 3)
    expected = F.conv2d(images(), weight, stride=2, padding=1, groups=8)
    for backend in ("auto", "cpu", "reference"):
        torch.testing.assert_close(
            functional.depthwise_conv2d(images(), weight, None, stride, backend=backend), expected
        )


@pytest.mark.parametrize(
    ("stride", "error"),
    [(3, ValueError), ((1, 2), ValueError), ((), ValueError), ((2, 2, 2), ValueError), (0, ValueError)]
    + [(wrong, TypeError) for wrong in (2.0, "2", None, True, (2, "2"), torch.tensor(2))],
)
def test_wrong_strides_of_the_function_are_sentences(stride: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^stride must be (one of|an integer)") as raised:
        functional.depthwise_conv2d(images(), torch.randn(8, 1, 3, 3), None, stride)
    assert str(raised.value).endswith(f"got {stride!r}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", None, "x must be a tensor, got NoneType"),
        ("weight", None, "weight must be a tensor, got NoneType"),
        ("bias", 3.0, "bias must be a tensor, got float"),
        ("weight", torch.zeros(8, 2, 3, 3), r"weight must be \(C, 1, k, k\), got \(8, 2, 3, 3\)"),
        ("weight", torch.zeros(8, 1, 4, 4), r"kernel_size must be one of \(3, 5, 7\) in both directions, got \(4, 4\)"),
        ("bias", torch.zeros(7), r"bias must be \(8,\), got \(7,\)"),
        ("weight", torch.zeros(8, 1, 3, 3, device="meta"), "weight is on meta, x on cpu: move them to one device"),
    ],
)
def test_wrong_tensors_of_the_function_are_sentences(name: str, value: Any, message: str) -> None:
    arguments = {"x": images(), "weight": torch.zeros(8, 1, 3, 3), "bias": torch.zeros(8), name: value}
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        functional.depthwise_conv2d(**arguments)
