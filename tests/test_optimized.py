"""Models that are changed before they are optimized, and the uses of an optimized model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from biasloss_ext import FusedBiasLoss, accelerate, functional, optimize_for_inference
from biasloss_ext.nn import DepthwiseConv2d
from tests.networks import MODELS, network

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same(ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor = IMAGES) -> None:
    expected = plain(x)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def stem(**options: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.first_layer[0] = nn.Conv2d(3, model.first_layer[0].out_channels, 3, stride=2, **options)

    return change


def doubled(*_: Any) -> Any:
    return 2 * _[-1]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "reflected padding": stem(padding=1, padding_mode="reflect", bias=False),
    "circular padding and a bias": stem(padding=1, padding_mode="circular"),
    "replicated padding": stem(padding=(1, 1), padding_mode="replicate", bias=False),
    "dilation": stem(padding=2, dilation=2, bias=False),
    "a hook on the stem's normalization": lambda m: m.first_layer[1].register_forward_hook(doubled),
    "a hook on the last convolution": lambda m: m.conv[0].register_forward_hook(doubled),
    "a parametrized stem": lambda m: parametrizations.weight_norm(m.first_layer[0]),
    "a parametrized depthwise convolution": lambda m: parametrizations.weight_norm(m.base_block.conv[3]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_computed_as_it_is(change: str) -> None:
    model = network()
    CHANGES[change](model)
    assert_same(optimize_for_inference(model), model)


@pytest.mark.parametrize("name", MODELS)
def test_optimizing_twice_changes_nothing(name: str) -> None:
    once = optimize_for_inference(MODELS[name]())
    assert_same(optimize_for_inference(once), once)
    assert_same(optimize_for_inference(nn.Sequential(once)), once)
    accelerate(once)
    assert_same(copy.deepcopy(once), once)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_network_computes_what_it_did(name: str) -> None:
    """Conversion prepares everything again, from the layers as they were."""
    once = optimize_for_inference(MODELS[name]())
    with torch.no_grad():
        expected = once(IMAGES)
        torch.testing.assert_close(once.double()(IMAGES.double()).float(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(once.float()(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_an_optimized_network_can_be_pickled() -> None:
    optimized = optimize_for_inference(network())
    assert_same(pickle.loads(pickle.dumps(optimized)), optimized)


@pytest.mark.parametrize("name", MODELS)
def test_quantized_linear_layers(name: str) -> None:
    """Those of the attentions and of the classifier; the blocks with attention are left to the plain layers."""
    model = MODELS[name]()
    for made in (model, optimize_for_inference(model)):
        quantized = torch.ao.quantization.quantize_dynamic(made, {nn.Linear})
        with torch.no_grad():
            expected = made(IMAGES)
            assert (quantized(IMAGES) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("size", [(96, 96), (80, 112)])
@pytest.mark.parametrize("name", MODELS)
def test_export_with_sizes_that_vary_through_torchscript(name: str, size: tuple[int, int]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = MODELS[name](), io.BytesIO()
    vary = {"x": {0: "n", 2: "height", 3: "width"}, "scores": {0: "n"}}
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["scores"], "dynamic_axes": vary}
    torch.onnx.export(optimize_for_inference(model), (IMAGES,), file, dynamo=False, **names)
    session = onnxruntime.InferenceSession(file.getvalue())
    assert_same(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model, torch.randn(3, 3, *size))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_leaves_float64_alone(name: str) -> None:
    model = MODELS[name]().double()
    models = (optimize_for_inference(model), model, copy.deepcopy(model).train())

    def result(made: nn.Module, autocast: bool) -> Tensor:
        torch.manual_seed(1)  # the same samples are dropped
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return copy.deepcopy(made)(IMAGES.double())

    for made in models:
        torch.testing.assert_close(result(made, True), result(made, False), rtol=0, atol=0)


def test_autocast_leaves_float64_alone_in_layers_and_losses() -> None:
    x, features = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    layer = DepthwiseConv2d(4, 4, 3, padding=1, groups=4).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float64
        assert functional.feature_variance(features).dtype == torch.float64
        assert FusedBiasLoss()(features, features, torch.arange(4)).dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_is_refused_before_anything_is_loaded(name: str, assign: bool) -> None:
    model = MODELS[name]()
    optimized = optimize_for_inference(model)
    for other in (model.state_dict(), optimized.state_dict(), {}):
        with pytest.raises(
            RuntimeError, match=r"cannot load a state_dict, .*: load it into the model it was made from"
        ):
            optimized.load_state_dict(
                {key: torch.zeros_like(t) for key, t in other.items()}, strict=False, assign=assign
            )
    with pytest.raises(RuntimeError, match="cannot load a state_dict"):
        nn.Sequential(optimized).load_state_dict({}, strict=False)
    assert_same(optimized, model)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_are_channels_last_whatever_the_images_are(layout: torch.memory_format) -> None:
    """PyTorch's own convolutions take several times as long in between if maps go back and forth."""
    layers = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)]
    model = optimize_for_inference(nn.Sequential(*layers))
    maps: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, y: maps.append(y))
    model(torch.randn(2, 3, 20, 20).contiguous(memory_format=layout))
    assert [y.is_contiguous(memory_format=torch.channels_last) for y in maps] == [True, True]
