"""A fused block whose layers were exchanged, pruned, parametrized or hooked computes what its layers compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from biasloss_ext.nn import FusedInvertedResidual, FusedSkipBlock
from biasloss_ext.nn.fused_inverted_residual import chain_of


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def doubled_depthwise(layers: nn.Sequential) -> None:
    layers[3] = Doubled(16, 16, 3, padding=1, groups=16, bias=False)


def doubled_projection(layers: nn.Sequential) -> None:
    layers[-2] = Doubled(16, 8, 1, bias=False)


def shifted_norm(layers: nn.Sequential) -> None:
    layers[1] = Shifted(16)


def other_activation(layers: nn.Sequential) -> None:
    layers[2] = nn.Softplus()


def pruned(layers: nn.Sequential) -> None:
    prune.l1_unstructured(layers[0], "weight", 0.3)


def parametrized(layers: nn.Sequential) -> None:
    parametrizations.weight_norm(layers[3])


def hooked_norm(layers: nn.Sequential) -> None:
    layers[4].register_forward_hook(lambda module, arguments, output: output + 1)


def hooked_activation(layers: nn.Sequential) -> None:
    layers[5].register_forward_hook(lambda module, arguments, output: 2 * output)


def pre_hooked(layers: nn.Sequential) -> None:
    layers[-1].register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))


def forward_of_its_own(layers: nn.Sequential) -> None:
    layers[0].forward = lambda x: 3 * nn.Conv2d.forward(layers[0], x)


def longer(layers: nn.Sequential) -> None:
    layers.append(nn.Hardswish())


EXCHANGES = (
    doubled_depthwise, doubled_projection, shifted_norm, other_activation, pruned, parametrized, hooked_norm,
    hooked_activation, pre_hooked, forward_of_its_own, longer,
)  # fmt: skip


def attention_without_bias(layers: nn.Sequential) -> None:
    layers[6].fc[0] = nn.Linear(16, 8, bias=False)


def attention_with_tanh(layers: nn.Sequential) -> None:
    layers[6].fc[3] = nn.Tanh()


def attention_of_another_kind(layers: nn.Sequential) -> None:
    layers[6] = nn.Dropout2d(0.0)


def attention_hooked(layers: nn.Sequential) -> None:
    layers[6].register_forward_hook(lambda module, arguments, output: 2 * output)


ATTENTIONS = (attention_without_bias, attention_with_tanh, attention_of_another_kind, attention_hooked)


def two_steps(module: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = []
    for _ in range(2):
        module.zero_grad()
        out = module(*arguments)
        out.square().sum().backward()
        outputs += [out.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
    return outputs


@pytest.mark.parametrize("exchange", [*EXCHANGES, *ATTENTIONS], ids=lambda e: e.__name__)
def test_an_inverted_residual_runs_its_own_layers(exchange: Callable[[nn.Sequential], None]) -> None:
    torch.manual_seed(0)
    fused = FusedInvertedResidual(8, 16, 8, 3, squeeze_excite=exchange in ATTENTIONS).train()
    exchange(fused.conv)
    assert isinstance(chain_of(fused.conv), str) == (exchange is not attention_without_bias)
    plain = _twin(fused, exchange)
    x = torch.randn(2, 8, 6, 6)
    for ours, expected in zip(two_steps(fused, (x,)), two_steps(plain, (x,)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("exchange", [e for e in EXCHANGES if e is not longer], ids=lambda e: e.__name__)
def test_a_skip_block_runs_its_own_layers(exchange: Callable[[nn.Sequential], None]) -> None:
    torch.manual_seed(0)
    fused = FusedSkipBlock(8, 16, 8, 3).train()
    exchange(fused.core_block)
    plain = _twin(fused, exchange)
    arguments = (torch.randn(2, 8, 12, 12), torch.randn(2, 8, 6, 6))
    for ours, expected in zip(two_steps(fused, arguments), two_steps(plain, arguments), strict=True):
        torch.testing.assert_close(ours, expected)


def _twin(fused: nn.Module, exchange: Callable[[nn.Sequential], None]) -> nn.Module:
    """The same block, exchanged alike, on the plain path."""
    torch.manual_seed(0)
    if isinstance(fused, FusedInvertedResidual):
        twin = FusedInvertedResidual(8, 16, 8, 3, squeeze_excite=exchange in ATTENTIONS, fused=False)
        exchange(twin.conv)
    else:
        twin = FusedSkipBlock(8, 16, 8, 3, fused=False)
        exchange(twin.core_block)
    twin.load_state_dict(fused.state_dict())
    return twin.train()


@pytest.mark.parametrize("layer", [0, -2])
def test_a_padded_1x1_convolution_is_padded(layer: int) -> None:
    torch.manual_seed(0)
    fused, plain = (FusedInvertedResidual(8, 16, 12, 3, fused=choice) for choice in ("auto", False))
    for block in (fused, plain):
        inputs, outputs = block.conv[layer].in_channels, block.conv[layer].out_channels
        block.conv[layer] = nn.Conv2d(inputs, outputs, 1, padding=1, bias=False)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 8, 6, 6)
    assert fused(x).shape == (2, 12, 8, 8)
    torch.testing.assert_close(fused(x), plain(x))


def test_a_hook_on_all_modules_sees_the_layers_of_a_block() -> None:
    """As counters of floating-point operations register them."""
    torch.manual_seed(0)
    fused, seen = FusedInvertedResidual(8, 16, 8, 3), []
    handle = register_module_forward_hook(lambda module, arguments, output: seen.append(type(module)))
    try:
        fused(torch.randn(2, 8, 6, 6))
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 3
    seen.clear()
    fused(torch.randn(2, 8, 6, 6))
    assert not seen


@pytest.mark.parametrize("squeeze_excite", [True, False])
def test_a_block_as_it_was_built_is_fused(squeeze_excite: bool) -> None:
    assert not isinstance(chain_of(FusedInvertedResidual(8, 16, 8, 3, squeeze_excite=squeeze_excite).conv), str)
    assert not isinstance(chain_of(FusedSkipBlock(8, 16, 8, 3).core_block), str)


@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.Hardsigmoid])
@pytest.mark.parametrize("hidden", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_an_attention_with_other_activations_stays_fused(kind: type[nn.Module], hidden: type[nn.Module]) -> None:
    torch.manual_seed(0)
    fused = FusedInvertedResidual(8, 16, 8, 3, squeeze_excite=True).train()
    fused.conv[6].fc[1], fused.conv[6].fc[3] = hidden(), kind()
    assert not isinstance(chain_of(fused.conv), str)
    x = torch.randn(2, 8, 6, 6)
    ours = fused(x)
    fused.fused = False
    torch.testing.assert_close(ours, fused(x))
