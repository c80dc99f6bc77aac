"""What people do with models works on accelerated ones, or says why not."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from biasloss_ext import accelerate, optimize_for_inference
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.report import DEPTHWISE
from tests.nn.blocks import randomize


class UniversalBottleneck(nn.Module):
    """The block of MobileNetV4 by somebody else: depthwise convolutions before and after the expansion, and a layer scale."""

    def __init__(self, inputs: int, hidden: int, outputs: int, first: int, second: int, stride: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        if first:
            self.layers["begin"] = self.convolution(inputs, inputs, first, 1 if second else stride, inputs, None)
        self.layers["widen"] = self.convolution(inputs, hidden, 1, 1, 1, nn.ReLU())
        if second:
            self.layers["middle"] = self.convolution(hidden, hidden, second, stride, hidden, nn.ReLU())
        self.layers["narrow"] = self.convolution(hidden, outputs, 1, 1, 1, None)
        self.same = inputs == outputs and stride == 1
        if self.same:
            self.gamma = nn.Parameter(torch.full((outputs, 1, 1), 0.5))

    @staticmethod
    def convolution(
        inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: nn.Module | None
    ) -> nn.Module:
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        return nn.Sequential(*layers, *([] if activation is None else [activation]))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers.values():
            h = layer(h)
        return x + h * self.gamma if self.same else h


def network() -> nn.Sequential:
    """MobileNetV4 in small."""
    torch.manual_seed(0)
    made = nn.Sequential(
        UniversalBottleneck.convolution(3, 8, 3, 2, 1, nn.ReLU()),
        UniversalBottleneck(8, 16, 16, 3, 3, 2),
        UniversalBottleneck(16, 32, 16, 5, 0),
        UniversalBottleneck(16, 32, 16, 0, 3),
        UniversalBottleneck(16, 32, 16, 0, 0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    randomize(made, torch.Generator().manual_seed(0))
    return made.double()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 17, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def accelerated(plain: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert report.count(DEPTHWISE).fused == report.count(DEPTHWISE).total > 0, report
    return model


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model.train()(x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    with torch.no_grad():
        return [out, *(g for g in gradients if g is not None), *(b.double() for b in model.buffers()), model.eval()(x)]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for ours, expected in zip(results(model, images()), results(other, images()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-8 * max(1.0, expected.abs().max().item()))


def test_a_copy_of_mobilenet_v4_is_covered_as_the_original() -> None:
    plain = network()
    model = accelerated(plain)
    blocks = [module for module in model if isinstance(module, FusedBlock)]
    chains = [[step.kind for step in planned.chain.steps] for block in blocks[1:] for planned in block.plan().chains]  # type: ignore[union-attr]
    assert [len(chain) for chain in chains] == [4, 3, 3, 2]
    assert_same(model, plain)
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(optimize_for_inference(plain)(x), plain.eval()(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_steps(backend: str) -> None:
    torch._dynamo.reset()
    plain = network()
    model = accelerated(plain)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (model, twin)]
    for _ in range(3):
        for run, optimizer in ((compiled, optimizers[0]), (twin, optimizers[1])):
            optimizer.zero_grad()
            run(images()).square().sum().backward()
            optimizer.step()
    assert_same(model, twin)


def test_checkpointed_blocks() -> None:
    plain = network()
    model = accelerated(plain)

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    expected = results(model, images())[:-1]
    again = accelerated(plain)
    for index in range(1, 5):
        again[index] = Checkpointed(again[index])  # type: ignore[index, operator]
    found = results(again, images())[:-1]
    count = 1 + len(
        list(plain.parameters())
    )  # a block that runs twice moves its running statistics twice, as a plain one does
    for ours, truth in zip(found[:count], expected[:count], strict=True):
        torch.testing.assert_close(ours, truth)


def test_averaged_shared_and_functional() -> None:
    plain = network()
    model = accelerated(plain)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        expected = plain.eval()(images())
        torch.testing.assert_close(averaged.module.eval()(images()), expected)
        called = torch.func.functional_call(model.eval(), dict(plain.state_dict()), (images(),))
        torch.testing.assert_close(called, expected)
        doubled = {name: value * 2 for name, value in plain.named_parameters()}
        torch.testing.assert_close(
            torch.func.functional_call(model, doubled, (images(),)),
            torch.func.functional_call(plain, doubled, (images(),)),
        )
    shared = nn.Sequential(plain[0], plain[1], plain[3], plain[3], *plain[5:])
    assert_same(accelerated(shared), shared)


def test_inference_copies_of_partly_fused_blocks_can_be_pickled() -> None:
    class Split(UniversalBottleneck):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).roll(1, 1)

    globals()["Split"] = Split  # where pickle looks for it
    Split.__qualname__ = "Split"
    plain = nn.Sequential(Split(8, 16, 8, 3, 5), nn.Identity()).double().eval()
    optimized = optimize_for_inference(plain)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        for twin in (optimized, pickle.loads(pickle.dumps(optimized)), copy.deepcopy(optimized)):
            torch.testing.assert_close(twin(x), plain(x), rtol=1e-8, atol=1e-8)


def test_blocks_that_take_something_else_than_one_map() -> None:
    """Maps by name, as the head of LRASPP takes them, and an argument by its keyword."""

    class Named(UniversalBottleneck):
        def forward(self, maps: Any) -> Tensor:
            return super().forward(maps["low"] if isinstance(maps, dict) else maps)

    plain = nn.Sequential(Named(8, 16, 8, 3, 5), nn.Identity()).double().eval()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x)
        for model in (accelerated(plain), optimize_for_inference(plain)):
            torch.testing.assert_close(model({"low": x}), expected)
            torch.testing.assert_close(model[0](maps=x), expected)  # type: ignore[index, operator]
            torch.testing.assert_close(model(x), expected)


class Deciding(UniversalBottleneck):
    """Its code asks for settings, its own and those of a module within."""

    def __init__(self) -> None:
        super().__init__(8, 16, 8, 3, 5)
        self.within = nn.Sequential(nn.Identity())
        self.within.factor = 1  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.within.factor  # type: ignore[operator]
        return y * 3 if self.within.training else y


def test_settings_that_change_later_are_seen() -> None:
    """Also those of modules within, and through the block that was replaced."""
    plain = nn.Sequential(Deciding(), nn.Identity()).double().eval()
    model = accelerated(plain)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)

    def change(made: nn.Sequential, number: int) -> None:
        block: Any = made[0]
        if number == 1:
            block.within.train()
        elif number == 2:
            block.within.factor = 5
        elif number == 3:
            getattr(block, "plain", block).same = False
        elif number == 4:
            block.train()
        else:
            block.eval()

    with torch.no_grad():
        for number in range(6):
            for made in (plain, model):
                change(made, number)  # type: ignore[arg-type]
            torch.testing.assert_close(model(x), plain(x), msg=lambda m, n=number: f"change {n}: {m}")


def test_transforms_of_torch_func() -> None:
    """On the plain layers; refused where fused ones are asked for."""
    plain = network().eval()
    model = accelerated(plain)
    buffers = dict(plain.named_buffers())

    def loss(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        scores: Tensor = torch.func.functional_call(module, (parameters, buffers), (x,))
        return scores.square().sum()

    def transformed(module: nn.Module) -> list[Tensor]:
        parameters, x = dict(module.named_parameters()), images()
        gradients = torch.func.grad(lambda p: loss(module, p, x))(parameters)
        of_samples = torch.func.vmap(torch.func.grad(lambda p, image: loss(module, p, image[None])), in_dims=(None, 0))(
            parameters, x
        )
        derivative = torch.func.jvp(lambda image: module(image), (x,), (x,))[1]
        return [*gradients.values(), *of_samples.values(), derivative]

    for ours, expected in zip(transformed(model), transformed(plain), strict=True):
        torch.testing.assert_close(ours, expected)
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.fused = True
    with pytest.raises(
        RuntimeError, match=r"\(fused=True\) cannot run here: the fused ops have no torch.func transforms"
    ):
        transformed(model)


def test_a_parametrized_layer_is_called() -> None:
    plain = network()
    parametrizations.weight_norm(plain[1].layers["middle"][0])  # type: ignore[index, union-attr]
    model = copy.deepcopy(plain)
    accelerate(model)
    assert_same(model, plain)


def test_graphs_are_of_plain_layers() -> None:
    model = accelerated(network()).eval()
    x = images(1)
    expected = model(x)
    for graph in (
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (x,), strict=False).module(),
        torch.jit.trace(model, x),
    ):
        torch.testing.assert_close(graph(x), expected, rtol=1e-9, atol=1e-9)
    assert "biasloss" not in str(torch.fx.symbolic_trace(model).graph)


def test_torchscript_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"torch\.jit\.script cannot compile FusedBlock: script the model before accelerate"
    ):
        torch.jit.script(accelerated(network()))


def test_other_kinds_of_models_are_refused() -> None:
    for function in (accelerate, optimize_for_inference):
        with pytest.raises(ValueError, match="the model is compiled already"):
            function(torch.compile(network()))
        with pytest.raises(ValueError, match="a scripted model cannot be changed"):
            function(torch.jit.trace(network().eval(), images(1)))
    with pytest.raises(ValueError, match=r"0\.0\.weight is on the meta device, and has no values to fold"):
        optimize_for_inference(network().to("meta"))
    on_meta = network().to("meta")
    accelerate(on_meta)
    assert on_meta(images().to("meta")).shape == (3, 5)
    loaded = on_meta.to_empty(device="cpu")
    loaded.load_state_dict(network().state_dict())
    assert_same(loaded, network())


def test_quantization_by_fx() -> None:
    """Quantization-aware training and static quantization of torch.ao, which trace the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize: Any = pytest.importorskip("torch.ao.quantization.quantize_fx")
        mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("fbgemm")
        plain = network().float()
        model = accelerated(plain)
        x = images().float()
        prepared = [quantize.prepare_qat_fx(m.train(), mapping, (x,)) for m in (copy.deepcopy(plain), model)]
        outputs = [p(x) for p in prepared]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
        prepared[1](x).sum().backward()
        assert quantize.convert_fx(prepared[1].eval())(x).shape == (3, 5)


def test_modules_fused_in_place_by_torch() -> None:
    """As fuse_model() of torchvision's quantizable models."""
    plain = network().float().eval()
    model = accelerated(plain)
    names = [["1.layers.begin.0", "1.layers.begin.1"], ["1.layers.widen.0", "1.layers.widen.1", "1.layers.widen.2"]]
    torch.ao.quantization.fuse_modules(model, names, inplace=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images().float()), plain(images().float()), rtol=1e-4, atol=1e-4)


def test_fuse_model_of_quantizable_models_is_refused() -> None:
    class Quantizable(nn.Sequential):
        def fuse_model(self) -> None:
            """Looks for blocks by their exact class."""

    plain = Quantizable(*network())
    plain.fuse_model()
    model = accelerated(plain)
    for twin in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"call it before accelerate\(\)"):
            twin.fuse_model()  # type: ignore[operator]


def test_dynamic_quantization() -> None:
    model = accelerated(network().float()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert quantized(images().float()).shape == (3, 5)
