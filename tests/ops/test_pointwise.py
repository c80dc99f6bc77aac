"""1x1 convolutions and channel_gram: every backend that runs on a CPU against float64, over drawn shapes and options."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.expand_depthwise import reference as expand_reference
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.pointwise import op, reference
from tests import norm_cases
from tests.calls import Call
from tests.runnable import assert_tests_pass_on, backends_of, other_variants

BACKENDS = backends_of("pointwise")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHANNELS = (1, 3, 8, 16, 17, 24, 40, 48, 67)
EPS = 1e-3
LARGE = (200, 130)  # several panels of the weight, several pieces of its depth


@dataclass(repr=False)
class Case:
    """Arguments of pointwise and, beside them, what its backward needs."""

    x: Tensor
    weight: Tensor
    affine: Tensor | None
    activation: int
    gate: Tensor | None
    bias: Tensor | None
    output_activation: int
    residual: Tensor | None
    grad: Tensor
    coefficients: Tensor | None
    moments: Tensor | None
    residual_grad: Tensor | None
    norm: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False

    def __repr__(self) -> str:
        shown = {
            name: f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if name != "norm"
        }
        return f"Case({shown}, weight strides {self.weight.stride()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def forward(self, want_statistics: bool = True) -> Call:
        names = ("affine", "activation", "gate", "bias", "output_activation", "residual")
        options = {name: getattr(self, name) for name in names}
        return Call((self.x, self.weight), {**options, "want_statistics": want_statistics, **self.norm})

    def backward(self, y: Tensor | None, want_x: bool = True, want_weight: bool = True) -> Call:
        names = ("affine", "moments", "activation", "gate", "residual_grad", "frozen")
        options = {name: getattr(self, name) for name in names}
        options |= {"y": y, "y_coefficients": self.coefficients, "want_x": want_x, "want_weight": want_weight}
        return Call((self.grad, self.x, self.weight), {**options, "eps": EPS})

    def to(self, dtype: torch.dtype) -> Case:
        """Every tensor in ``dtype``."""
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def laid_out(weight: Tensor, kind: str) -> Tensor:
    """The weight (K, C, 1, 1) in other memory: as it is, or as inference code keeps it, (C, K) in padded rows."""
    if kind == "plain":
        return weight
    outputs, channels = weight.shape[:2]
    padded = torch.full((channels, (outputs + 15) // 16 * 16), torch.nan, dtype=weight.dtype)
    padded[:, :outputs] = weight[:, :, 0, 0].T
    if kind == "transposed":
        return padded[:, :outputs].T[:, :, None, None]
    rows = torch.full((outputs, channels + 5), torch.nan, dtype=weight.dtype)
    rows[:, :channels] = weight[:, :, 0, 0]
    return rows[:, :channels, None, None]


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    wide = accumulation_dtype(dtype)
    samples, height, width = draw(
        st.sampled_from(((0, 3, 3), (1, 1, 1), (1, 7, 7), (3, 5, 4), (70, 1, 1), (2, 24, 23), (9, 7, 7), (5, 16, 16)))
    )
    channels, outputs = draw(st.sampled_from((LARGE, LARGE[::-1], None))) or (
        draw(st.sampled_from(CHANNELS)),
        draw(st.sampled_from(CHANNELS)),
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide)

    def feature_map(count: int, offset: float = 0.0) -> Tensor:
        return maps.channels_last((normal(samples, count, height, width) + offset).to(dtype))

    def maybe(value: Tensor) -> Tensor | None:
        return draw(st.sampled_from((value, None)))

    offset = draw(st.sampled_from((0.0, 100.0)))
    x = feature_map(channels, offset)
    affine = maybe(torch.stack((normal(channels), normal(channels) - offset * 0.9)))
    return Case(
        x=x,
        weight=laid_out(
            normal(outputs, channels, 1, 1) / channels**0.5, draw(st.sampled_from(("plain", "transposed", "rows")))
        ),
        affine=affine,
        activation=maps.IDENTITY if affine is None else draw(st.sampled_from(maps.Activation)).value,
        gate=maybe(torch.rand(samples, channels, generator=generator, dtype=wide)),
        bias=maybe(normal(outputs) + draw(st.sampled_from((0.0, 100.0)))),
        output_activation=draw(st.sampled_from(maps.Activation)).value,
        residual=maybe(feature_map(outputs)),
        grad=feature_map(outputs),
        coefficients=maybe(normal(6, outputs)),
        moments=None
        if affine is None
        else maybe(torch.stack((normal(channels) + offset, normal(channels).square() + 0.5))),
        residual_grad=maybe(feature_map(channels)),
        norm=norm_cases.drawn(outputs, dtype, generator),
        frozen=draw(st.booleans()),
    )


def assert_close(ours: Tensor, exact: Tensor, rough: Tensor, what: str, summed: Tensor | float = 0.0) -> None:
    """Within twice the error of torch's own computation, a few roundings of the largest value, one of the largest sum of
    magnitudes that a value is added up from (torch adds up in another order), and ours as it is stored."""
    assert ours.shape == exact.shape, what
    if not exact.numel():
        return
    own = (rough.double() - exact).abs().max().item()
    # In float64 the yardstick is rounded as much as what it measures.
    wide = accumulation_dtype(ours.dtype)
    roundings = torch.finfo(wide).eps * (32 if wide == torch.float64 else 1)
    bound = 2 * own + roundings * (4 * exact.abs().max().item() + float(torch.as_tensor(summed).max()))
    rounding = torch.finfo(ours.dtype).eps * exact.abs() if ours.dtype != wide else 0.0
    excess = ((ours.double() - exact).abs() - rounding).max().item()
    assert excess <= bound, f"{what}: off by {excess:.3g}, allowed are {bound:.3g}"


def magnitudes(case: Case, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the terms that y, grad_x, grad_weight, gate_grad, sums and coefficients are added up from, themselves added up;
    float64."""
    case = case.to(torch.float64)
    u = maps.normalized(case.x, case.affine)
    h, weight = maps.activate(u, case.activation).abs(), case.weight[:, :, 0, 0].abs()
    if case.affine is not None:  # the rounding of u, which may be small
        h = h + (case.x * maps.per_channel(case.affine[0])).abs() + maps.per_channel(case.affine[1]).abs()
    gate = torch.ones((), dtype=torch.float64) if case.gate is None else maps.per_channel(case.gate)
    product = torch.einsum("nihw,oi->nohw", h * gate, weight)
    if case.bias is not None:
        product = product + maps.per_channel(case.bias).abs()
    dy = case.grad.abs()
    if y is not None and case.coefficients is not None:
        a, b, c, center = (maps.per_channel(row) for row in case.coefficients[:4])
        dy = (a * dy).abs() + (b * (y - center)).abs() + c.abs()
    dz = torch.einsum("nohw,oi->nihw", dy, weight)
    dh = dz * gate + (0.0 if case.residual_grad is None else case.residual_grad.abs())
    sums, coefficients = h.new_zeros(4), h.new_zeros(6)
    if case.moments is not None and case.affine is not None:
        slope, away = maps.derivative(u, case.activation).abs(), (case.x - maps.per_channel(case.moments[0])).abs()
        terms = (dh * slope, slope, dh * slope * away, slope * away)
        sums = torch.stack([term.sum((2, 3)).amax() if term.numel() else h.new_zeros(()) for term in terms])
        du, centered = terms[0].sum((0, 2, 3)), terms[2].sum((0, 2, 3))
        scale, rstd = case.affine[0].abs(), torch.rsqrt(case.moments[1] + EPS)
        count = max(h.numel() // h.shape[1], 1)
        rows = (0 * du, scale * rstd.square() * centered / count, scale * du / count, 0 * du, rstd * centered, du)
        coefficients = torch.stack([row.amax() for row in rows])
    of_weight = torch.einsum("nohw,nihw->oi", dy, h * gate)
    return product, dh, of_weight, (dz * h).sum((2, 3)), sums, coefficients


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_forward_agrees_with_float64(backend: str, case: Case) -> None:
    called = case.forward().fresh()
    y, moments = called(op.forward, backend=backend)
    norm_cases.check_statistics(moments, y, case.norm, called.options)
    exact, _ = case.to(torch.float64).forward(False)(reference.pointwise)
    rough, _ = case.to(accumulation_dtype(case.x.dtype)).forward(False)(reference.pointwise)
    assert y.dtype == case.x.dtype
    assert moments.dtype == accumulation_dtype(case.x.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, exact, rough, "y", magnitudes(case, None)[0])
    # Of the values as they are stored, whatever their own error.
    truth = maps.moments_of(y.double())
    wide = maps.moments_of(y.to(moments.dtype))
    largest = y.double().abs().max().item() if y.numel() else 0.0
    assert_close(moments[0], truth[0], wide[0], "mean", 4 * largest)
    # The variance of a constant channel is the square of the rounding of its mean.
    assert_close(moments[1], truth[1], wide[1], "variance", largest**2 * torch.finfo(moments.dtype).eps)
    again, none = case.forward(want_statistics=False)(op.forward, backend=backend)
    assert torch.equal(again, y)
    assert none.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=cases(), wanted=st.tuples(st.booleans(), st.booleans()))
def test_backward_agrees_with_float64(backend: str, case: Case, wanted: tuple[bool, bool]) -> None:
    # torch takes the sixth of the hard sigmoid's slope in float32, whatever the dtype.
    assume(case.x.dtype != torch.float64 or case.activation != maps.HARDSIGMOID)
    y = None if case.coefficients is None else case.residual if case.residual is not None else case.grad.neg()
    ours = case.backward(y, *wanted)(op.backward, backend=backend)
    y64 = None if y is None else y.double()
    wide = accumulation_dtype(case.x.dtype)
    exact = case.to(torch.float64).backward(y64, *wanted)(reference.pointwise_backward)
    rough = case.to(wide).backward(None if y is None else y.to(wide), *wanted)(reference.pointwise_backward)
    assert ours[0].dtype == case.x.dtype
    assert all(t.dtype == wide for t in ours[1:])
    if wanted[0]:
        assert ours[0].is_contiguous(memory_format=torch.channels_last)
    summed = magnitudes(case, y64)
    for i, name in enumerate(("grad_x", "grad_weight", "gate_grad")):
        assert_close(ours[i], exact[i], rough[i], name, summed[i + 1])
    for index, name in ((3, "sums"), (4, "coefficients")):
        assert ours[index].shape == exact[index].shape, name
        for row in range(len(exact[index])):
            bounds = (exact[index][row], rough[index][row], f"{name}[{row}]", summed[index + 1][row])
            assert_close(ours[index][row], *bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [0.0, 1000.0])
def test_moments_and_gram_far_from_zero(backend: str, dtype: torch.dtype, ratio: float) -> None:
    """A mean of 1000, with an outlier where a shift might be taken from, and a drift: pieces and tiles differ."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 19, 80, 81, generator=generator, dtype=torch.float64)
    x += torch.linspace(0, 3, 80)[:, None]
    x[0, :, 0, 0] += 30
    x = maps.channels_last((x + ratio).to(dtype))
    eye = torch.eye(19, dtype=dtype)[:, :, None, None]
    _, moments = op.forward(x, eye, want_statistics=True, backend=backend)
    truth = maps.moments_of(x.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(moments[0].double(), truth[0], rtol=4 * eps, atol=16 * eps)
    # Pieces are merged in float64, where a mean is rounded to an ulp of 1000 and more.
    torch.testing.assert_close(moments[1].double(), truth[1], rtol=64 * eps + ratio * 2.0**-52, atol=0)

    mean, gram = expand_depthwise.gram(x, backend=backend)
    exact_mean, exact = expand_reference.channel_gram(x.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=4 * eps, atol=16 * eps)
    # The rounding of the mean moves every centered value by up to half an ulp of it.
    allowed = 64 * eps * (1 + ratio * eps) * exact.diagonal().max().item()
    torch.testing.assert_close(gram.double(), exact, rtol=0, atol=allowed)
    if backend != "reference":  # a product of torch's own, which not every CPU sums in one order for both halves
        assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_gram_agrees_with_float64(backend: str, case: Case) -> None:
    mean, gram = expand_depthwise.gram(case.x, backend=backend)
    exact_mean, exact = expand_reference.channel_gram(case.x.double())
    rough_mean, rough = expand_reference.channel_gram(case.x.to(mean.dtype))
    assert_close(
        mean, exact_mean, rough_mean, "mean", 4 * case.x.double().abs().max().item() if case.x.numel() else 0.0
    )
    assert_close(gram, exact, rough, "gram", 4 * exact.abs().max() if exact.numel() else 0.0)


def outputs_of(case: Case) -> list[Tensor]:
    y = case.residual if case.coefficients is not None else None
    called = case.forward().fresh()
    forward = called(op.forward, backend="cpu")
    moved = [called.options["running_mean"], called.options["running_var"]]
    backward = case.backward(y)(op.backward, backend="cpu")
    without_gate = replace(case, gate=None).backward(y)(op.backward, backend="cpu")
    return [*forward, *moved, *backward, *without_gate, *expand_depthwise.gram(case.x, backend="cpu")]


def large_case(samples: int, side: int, channels: int, outputs: int, dtype: torch.dtype = torch.float32) -> Case:
    """Everything on, and work for more than one thread."""
    generator = torch.Generator().manual_seed(samples + channels)
    wide = accumulation_dtype(dtype)

    def feature_map(count: int) -> Tensor:
        return maps.channels_last(torch.randn(samples, count, side, side, generator=generator).to(dtype))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide)

    return Case(
        *(feature_map(channels), normal(outputs, channels, 1, 1), normal(2, channels), maps.HARDSWISH),
        *(normal(samples, channels), normal(outputs), maps.IDENTITY, feature_map(outputs)),
        *(feature_map(outputs), normal(6, outputs), normal(2, channels).square(), feature_map(channels)),
        norm_cases.drawn(outputs, dtype, generator),
    )


@pytest.mark.parametrize("shape", [(6, 33, 24, 72), (1, 7, 160, 960), (30, 7, 120, 40), (1, 14, 480, 112)])
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(shape: tuple[int, int, int, int]) -> None:
    case = large_case(*shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outputs_of(case)
        torch.set_num_threads(2)
        pairs = [*zip(alone, outputs_of(case), strict=True), *zip(alone, outputs_of(case), strict=True)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bad_input_is_named() -> None:
    case = large_case(2, 3, 5, 7)
    cpu = {"backend": "cpu"}
    with pytest.raises(RuntimeError, match="an activation needs affine"):
        op.forward(case.x, case.weight, activation=maps.RELU, **cpu)
    with pytest.raises(RuntimeError, match=r"weight: expected shape \(K, 5, 1, 1\)"):
        op.forward(case.x, case.weight[:, :4], **cpu)
    with pytest.raises(RuntimeError, match=r"residual: expected a map of shape \(2, 7, 3, 3\)"):
        op.forward(case.x, case.weight, residual=case.x, **cpu)
    with pytest.raises(RuntimeError, match="x: expected a dense channels_last map"):
        op.forward(case.x.contiguous(), case.weight, **cpu)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_of_any_origin(backend: str, dtype: torch.dtype) -> None:
    """Where dy sums to zero in exact arithmetic, a mean of x far from zero adds nothing but what dy is rounded by."""
    case = large_case(3, 9, 24, 40, dtype)
    grad = maps.channels_last((case.grad.double() - case.grad.double().mean((0, 2, 3), keepdim=True)).to(dtype))
    x, weight = maps.channels_last((case.x.double() + 30).to(dtype)), case.weight
    call = Call((grad, x, weight), {"any_origin": True})
    _, ours, *_ = call(op.backward, backend=backend)
    _, plain, *_ = call.but(any_origin=False)(op.backward, backend=backend)
    _, exact, *_ = call.to(torch.float64)(reference.pointwise_backward)
    of_rounding = grad.double().sum((0, 2, 3)).abs().max().item() * 60
    assert ours.shape == plain.shape == exact.shape
    assert_close(ours, exact, plain, "grad_weight", torch.tensor(of_rounding / torch.finfo(ours.dtype).eps))


@pytest.mark.parametrize("variant", other_variants())
def test_the_other_cpu_variants(variant: str) -> None:
    assert_tests_pass_on(variant, "cpu and float64 or far", __file__)
