"""The gate of squeeze-and-excitation against float64."""

from __future__ import annotations

import map_cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.squeeze_excite import op, reference

BACKENDS = ("cpu", "reference")
CPU = torch.device("cpu")
GATES = (maps.HARDSIGMOID, maps.SIGMOID)


def parameters(samples: int, channels: int, reduced: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, channels), (reduced, channels), (reduced,), (channels, reduced), (channels,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(
    samples=st.sampled_from((0, 1, 2, 5, 16)),
    channels=st.sampled_from((1, 16, 24, 63, 96, 130, 480)),
    reduced=st.sampled_from((1, 4, 10, 16, 24, 61, 120)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    activation=st.sampled_from((maps.RELU, maps.SILU, maps.HARDSWISH)),
    gate=st.sampled_from(GATES),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(  # type: ignore[no-untyped-def]
    backend, samples, channels, reduced, dtype, activation, gate, seed
) -> None:
    given_ = parameters(samples, channels, reduced, dtype, seed)
    given_[1], given_[3] = given_[1] / channels**0.5, given_[3] / reduced**0.5
    ours = op.forward(*given_, activation, gate, device=CPU, backend=backend)
    exact = [t.double().requires_grad_() for t in given_]
    squeezed = exact[0] @ exact[1].T + exact[2]
    excited = map_cases.ACTIVATIONS[activation](squeezed) @ exact[3].T + exact[4]
    truth = (map_cases.ACTIVATIONS[gate](excited), squeezed, excited)
    own = reference.squeeze_excite(*given_, activation, gate)
    for name, mine, expected, other in zip(("gate", "reduced", "expanded"), ours, truth, own, strict=True):
        assert mine.shape == expected.shape
        assert mine.dtype == dtype
        oracle.assert_as_close_as_torch(mine, expected.detach(), other, 4.0, name)

    gate_grad = torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
    # Where rounding decides the side of a kink, no gradient comes in: at the gate, and then at the reduced values.
    for kink in map_cases.KINKS[gate]:
        gate_grad = torch.where((excited - kink).abs() < 1e-5, 0, gate_grad)
    if any(((squeezed - kink).abs() < 1e-5).any() for kink in map_cases.KINKS[activation]):
        return
    arguments = (gate_grad, given_[0], ours[1], ours[2], given_[1], given_[3], activation, gate)
    gradients = op.backward(*arguments, device=CPU, backend=backend)
    expected_gradients = torch.autograd.grad(truth[0], exact, gate_grad.double())
    own_gradients = reference.squeeze_excite_backward(*arguments)
    for name, mine, expected, other in zip(
        ("pooled", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias"),
        gradients,
        expected_gradients,
        own_gradients,
        strict=True,
    ):
        assert mine.shape == expected.shape
        assert mine.dtype == dtype
        oracle.assert_as_close_as_torch(mine, expected, other, 8.0, f"gradient of {name}")


@pytest.mark.parametrize(("samples", "channels", "reduced"), [(16, 963, 241), (3, 672, 168), (16, 2000, 10)])
def test_does_not_depend_on_the_number_of_threads(samples: int, channels: int, reduced: int) -> None:
    given_ = parameters(samples, channels, reduced, torch.float32, 0)

    def results() -> list[Tensor]:
        gate, squeezed, excited = op.forward.native(*given_, maps.RELU, maps.SIGMOID)
        arguments = (gate, given_[0], squeezed, excited, given_[1], given_[3], maps.RELU, maps.SIGMOID)
        return [gate, squeezed, excited, *op.backward.native(*arguments)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        together = results()
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one, two)


def test_no_channels() -> None:
    pooled, down, reduce_bias, up, bias = parameters(2, 0, 4, torch.float32, seed=1)
    _, squeezed, excited = op.forward(
        pooled, down, reduce_bias, up, bias, maps.RELU, maps.SIGMOID, device=CPU, backend="cpu"
    )
    arguments = (torch.empty(2, 0), pooled, squeezed, excited, down, up, maps.RELU, maps.SIGMOID)
    gradients = op.backward(*arguments, device=CPU, backend="cpu")
    assert [tuple(gradient.shape) for gradient in gradients] == [(2, 0), (4, 0), (4,), (0, 4), (0,)]
    assert not gradients[2].any()


def test_opcheck() -> None:
    given_ = parameters(3, 7, 4, torch.float32, 0)
    gate, squeezed, excited = op.forward.native(*given_, maps.RELU, maps.HARDSIGMOID)
    torch.library.opcheck(op.forward.native, (*given_, maps.RELU, maps.HARDSIGMOID))
    arguments = (gate, given_[0], squeezed, excited, given_[1], given_[3], maps.RELU, maps.HARDSIGMOID)
    torch.library.opcheck(op.backward.native, arguments)


def test_bad_input() -> None:
    given_ = parameters(3, 7, 4, torch.float32, 0)
    with pytest.raises(RuntimeError, match=r"expected pooled \(N, C\) and reduce_weight \(R, C\)"):
        op.forward.native(given_[0], given_[3], *given_[2:], maps.RELU, maps.SIGMOID)
    with pytest.raises(RuntimeError, match="expand_bias: expected 7 contiguous values, got 4"):
        op.forward.native(*given_[:4], given_[2], maps.RELU, maps.SIGMOID)
