"""The gate of squeeze-and-excitation against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.squeeze_excite import op, reference
from tests import oracle
from tests.calls import Call
from tests.ops import map_cases
from tests.runnable import backends_of

BACKENDS = backends_of("squeeze_excite")
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
    activation=st.sampled_from((maps.RELU, maps.SILU, maps.HARDSWISH, maps.GELU, maps.GELU_TANH)),
    gate=st.sampled_from(GATES),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(  # type: ignore[no-untyped-def]
    backend, samples, channels, reduced, dtype, activation, gate, seed
) -> None:
    given_ = parameters(samples, channels, reduced, dtype, seed)
    given_[1], given_[3] = given_[1] / channels**0.5, given_[3] / reduced**0.5
    activations = {"activation": activation, "gate_activation": gate}
    ours = op.forward(*given_, **activations, backend=backend)
    exact = [t.double().requires_grad_() for t in given_]
    squeezed = exact[0] @ exact[1].T + exact[2]
    excited = map_cases.ACTIVATIONS[activation](squeezed) @ exact[3].T + exact[4]
    truth = (map_cases.ACTIVATIONS[gate](excited), squeezed, excited)
    own = reference.squeeze_excite(*given_, **activations)
    for name, mine, expected, other in zip(("gate", "reduced", "expanded"), ours, truth, own, strict=True):
        assert mine.shape == expected.shape
        assert mine.dtype == dtype
        # In float64 the yardstick is rounded as much as what it measures.
        roundings = 16.0 if dtype == torch.float64 else 4.0
        oracle.assert_as_close_as_torch(mine, expected.detach(), other, roundings, name)

    gate_grad = torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
    # Where rounding decides the side of a kink, no gradient comes in: at the gate, and then at the reduced values.
    for kink in map_cases.KINKS[gate]:
        gate_grad = torch.where((excited - kink).abs() < 1e-5, 0, gate_grad)
    if any(((squeezed - kink).abs() < 1e-5).any() for kink in map_cases.KINKS[activation]):
        return
    call = Call((gate_grad, given_[0], ours[1], ours[2], given_[1], given_[3]), activations)
    *gradients, none = call(op.backward, backend=backend)
    assert none.shape == (0,)
    expected_gradients = torch.autograd.grad(truth[0], exact, gate_grad.double())
    *own_gradients, _ = call(reference.squeeze_excite_backward)
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


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    samples=st.sampled_from((0, 1, 2, 5, 16)),
    channels=st.sampled_from((1, 16, 63, 130, 480)),
    positions=st.sampled_from((1, 49, 196)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    frozen=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_finished_coefficients(  # type: ignore[no-untyped-def]
    backend, samples, channels, positions, dtype, frozen, seed
) -> None:
    """From the sums of every sample, and the gradient of the pool that the op itself returns."""
    given_ = parameters(samples, channels, 4, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    sums, affine = (torch.randn(s, generator=generator).to(dtype) for s in ((4, samples, channels), (2, channels)))
    moments = torch.rand(2, channels, generator=generator).to(dtype) + 0.5
    options = {"activation": maps.SILU, "gate_activation": maps.SIGMOID, "eps": 1e-3, "frozen": frozen}
    _, reduced, expanded = op.forward(*given_, activation=maps.SILU, gate_activation=maps.SIGMOID, backend=backend)
    before = (given_[0], given_[0], reduced, expanded, given_[1], given_[3])
    finish = {"sums": sums, "affine": affine, "moments": moments, "positions": positions}
    call = Call(before, {**options, **finish})
    pool_grad, *_, ours = call(op.backward, backend=backend)
    assert ours.shape == (6, channels)
    assert ours.dtype == dtype
    *_, own = call(reference.squeeze_excite_backward)
    at_pool, sums, affine, moments = pool_grad.double() / positions, sums.double(), affine.double(), moments.double()
    terms = (sums[0] + at_pool * sums[1], sums[2] + at_pool * sums[3])
    plain, centered = (t.sum(0) for t in terms)
    count, rstd = samples * positions, 1 / (moments[1] + 1e-3).sqrt()
    constant = frozen or count == 0
    shares = (0 * plain, 0 * plain) if constant else (affine[0] * rstd**2 * centered / count, affine[0] * plain / count)
    truth = torch.stack((affine[0], -shares[0], -shares[1], moments[0], rstd * centered, plain))
    sizes = [(sums[i].abs() + (at_pool * sums[i + 1]).abs()).sum(0) for i in (0, 2)]
    largest = max(size.max().item() for size in sizes) + at_pool.abs().sum().item()
    for row, size in enumerate((0.0, 4 / max(count, 1), 2 / max(count, 1), 0.0, 2.0, 1.0)):
        expected, scale = truth[row], size * largest * affine[0].abs().max().item() if row in (1, 2) else size * largest
        oracle.assert_as_close_as_torch(ours[row], expected, own[row], scale, f"row {row} of the coefficients")


@pytest.mark.parametrize(("samples", "channels", "reduced"), [(16, 963, 241), (3, 672, 168), (16, 2000, 10)])
def test_does_not_depend_on_the_number_of_threads(samples: int, channels: int, reduced: int) -> None:
    given_ = parameters(samples, channels, reduced, torch.float32, 0)
    activations = {"activation": maps.RELU, "gate_activation": maps.SIGMOID}
    finish = {"sums": torch.randn(4, samples, channels), "affine": torch.randn(2, channels), "positions": 49}

    def results() -> list[Tensor]:
        gate, squeezed, excited = op.forward.native(*given_, **activations)
        arguments = (gate, given_[0], squeezed, excited, given_[1], given_[3])
        moments = finish["affine"].abs()
        return [gate, squeezed, excited, *op.backward.native(*arguments, **activations, **finish, moments=moments)]

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
    activations = {"activation": maps.RELU, "gate_activation": maps.SIGMOID, "backend": "cpu"}
    _, squeezed, excited = op.forward(pooled, down, reduce_bias, up, bias, **activations)
    *gradients, _ = op.backward(torch.empty(2, 0), pooled, squeezed, excited, down, up, **activations)
    assert [tuple(gradient.shape) for gradient in gradients] == [(2, 0), (4, 0), (4,), (0, 4), (0,)]
    assert not gradients[2].any()


def test_bad_input() -> None:
    given_ = parameters(3, 7, 4, torch.float32, 0)
    with pytest.raises(RuntimeError, match=r"expected pooled \(N, C\) and reduce_weight \(R, C\)"):
        op.forward.native(given_[0], given_[3], *given_[2:])
    with pytest.raises(RuntimeError, match="expand_bias: expected 7 contiguous values, got 4"):
        op.forward.native(*given_[:4], given_[2])
