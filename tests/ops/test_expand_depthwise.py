"""expand_depthwise and its backward against float64, over drawn shapes, kernels, strides, dtypes and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.nn.inference_block import packed, taps_first
from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise.op import output_size
from biasloss_ext.ops.expand_depthwise import op, reference
from tests import depthwise_cases as cases
from tests import norm_cases
from tests.calls import Call
from tests.depthwise_cases import CHANNELS, SIZES, Source
from tests.ops.map_cases import MAP_ACTIVATIONS as ACTIVATIONS
from tests.runnable import backends_of, other_variants, variant_in_use

BACKENDS = backends_of("expand_depthwise")
X, EXPAND_WEIGHT, AFFINE, WEIGHT = range(4)  # positions of arguments
MOMENTS = 4  # of backward


@st.composite
def operands(draw: st.DrawFn) -> tuple[Source, Call]:
    """x, expand_weight, affine, weight, activation, stride and padding"""
    source, narrow, channels = Source(draw), draw(st.sampled_from((1, 3, 16, 24))), draw(st.sampled_from(CHANNELS))
    # Many small maps: several in one piece of work, whose rows are multiplied together.
    samples, sizes = draw(st.sampled_from(((st.integers(0, 3), SIZES), (st.just(70), SIZES[:4]))))
    kernel, activation, stride = (draw(st.sampled_from(values)) for values in ((3, 5, 7), ACTIVATIONS, (1, 2)))
    x = source.map(draw(samples), narrow, draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes)))
    weight = source.values(channels, 1, kernel, kernel)
    arguments = (x, source.exact(channels, narrow, 1, 1), source.affine(channels), weight)
    options = {"activation": activation, "stride": stride, "same_padding": draw(st.booleans())}
    return source, Call(arguments, options)


@st.composite
def forward_cases(draw: st.DrawFn) -> Call:
    source, of_y = draw(operands())
    norm = norm_cases.drawn(of_y.arguments[WEIGHT].shape[0], source.dtype, source.generator)
    return of_y.but(want_statistics=draw(st.booleans()), **norm)


@st.composite
def activate_cases(draw: st.DrawFn) -> Call:
    source, of_y = draw(operands())
    y_affine = source.affine(of_y.arguments[WEIGHT].shape[0])
    options = {"y_activation": draw(st.sampled_from(ACTIVATIONS)), "want_pool": draw(st.booleans())}
    return Call((*of_y.arguments, y_affine), {**of_y.options, **options})


@st.composite
def backward_cases(draw: st.DrawFn) -> Call:
    source, of_y = draw(operands())
    x, expand_weight, affine, weight = of_y.arguments
    samples, narrow, height, width = x.shape
    channels, stride = weight.shape[0], of_y.options["stride"]
    out = (samples, channels, output_size(height, stride), output_size(width, stride))
    grad, pool_grad = source.gradient(*out), source.values(samples, channels)
    grad, pool_grad = draw(st.sampled_from(((grad, None), (None, pool_grad), (grad, pool_grad))))
    at_output = (source.map(*out), source.affine(channels), source.values(6, channels))
    options = {"grad": grad, "pool_grad": pool_grad, "y_activation": draw(st.sampled_from(ACTIVATIONS))}
    options |= {"eps": draw(st.sampled_from((1e-5, 0.1))), "frozen": draw(st.booleans())}
    arguments = (x, source.values(narrow), expand_weight, affine, source.moments(channels), weight, *at_output)
    return Call(arguments, {**of_y.options, **options})


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(call=forward_cases())
def test_forward_agrees_with_float64(backend: str, call: Call) -> None:
    called = call.fresh()
    y, statistics = called(op.forward, backend=backend)
    cases.compare(("y",), (y,), reference.expand_depthwise, call)
    if call.options["want_statistics"]:
        norm_cases.check_statistics(statistics, y, call.options, called.options)
    else:
        assert statistics.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(call=activate_cases())
def test_activated_agrees_with_float64(backend: str, call: Call) -> None:
    cases.compare(("h", "pooled"), call(op.activate, backend=backend), reference.expand_depthwise_activate, call)


@settings(max_examples=30, deadline=None)
@given(call=activate_cases())
def test_weights_as_the_kernels_read_them_change_no_bit(call: Call) -> None:
    expand_weight, weight = call.arguments[EXPAND_WEIGHT], call.arguments[WEIGHT]
    views = {EXPAND_WEIGHT: packed(expand_weight), WEIGHT: taps_first(weight)}
    assert torch.equal(views[EXPAND_WEIGHT], expand_weight)
    assert torch.equal(views[WEIGHT], weight)
    cases.assert_same(call(op.activate, backend="cpu"), call.but(views)(op.activate, backend="cpu"))
    options = {name: call.options[name] for name in ("activation", "stride", "same_padding")}
    plain = Call(call.arguments[:4], options)
    cases.assert_same(plain(op.forward, backend="cpu"), plain.but(views)(op.forward, backend="cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(call=backward_cases())
def test_backward_agrees_with_float64(backend: str, call: Call) -> None:
    gradients = call(op.backward, backend=backend)
    names = ("grad_x", "grad_expand", "grad_weight", "coefficients")
    cases.compare(names, gradients, reference.expand_depthwise_backward, call, MOMENTS)


# Wide enough to be cut into blocks of channels, high enough for several products a march, few enough samples for bands;
# and small maps of fewer channels than a vector has lanes, several of them in one product.
LARGE = """
from biasloss_ext.ops.expand_depthwise import op
g = torch.Generator().manual_seed(0)
normal = lambda *s: torch.randn(s, generator=g)
last = lambda t: t.contiguous(memory_format=torch.channels_last)
outputs = []
large = ((3, 1, 16, False), (5, 2, 24, False), (7, 1, 40, False), (3, 2, 16, True))
for kernel, stride, narrow, same in (*large, (5, 1, 8, False), (3, 2, 3, False)):
    samples, height, width = (70, 4, 2) if narrow < 16 else (2, 29 + same, 31 + same)
    x, weight, affine = last(normal(samples, narrow, height, width)), normal(330, 1, kernel, kernel), normal(2, 330)
    expand = normal(330, narrow, 1, 1) / narrow**0.5
    padded = {"stride": stride, "same_padding": same, "backend": "cpu"}
    y, statistics = op.forward(x, expand, affine, weight, want_statistics=True, **padded)
    moments = torch.stack((normal(330), normal(330).square() + 0.5))
    grad, y_affine = last(normal(*y.shape)), normal(2, 330)
    given = (x, normal(narrow), expand, affine, moments, weight, y, y_affine, normal(6, 330))
    *gradients, coefficients = op.backward(*given, grad=grad, **padded)
    options = {"activation": 3, "y_activation": 3, "want_pool": True, **padded}
    h, pooled = op.activate(x, expand, affine, weight, y_affine, **options)
    outputs += [y, *statistics, *gradients, *coefficients, h, pooled]
"""


def large_outputs(backend: str = "cpu") -> list[Tensor]:
    scope: dict[str, Any] = {"torch": torch}
    exec(LARGE.replace('"cpu"', repr(backend)), scope)
    return scope["outputs"]


def test_bits_do_not_depend_on_threads_or_runs() -> None:
    once = cases.with_threads(1, large_outputs)
    for threads in (2, 3):
        cases.assert_same(once, cases.with_threads(threads, large_outputs))
    cases.assert_same(once, large_outputs())


def test_instruction_sets_and_the_reference_agree(tmp_path: Path) -> None:
    expected = large_outputs("reference")
    for name in (variant_in_use(), *other_variants()):
        for a, b in zip(expected, cases.outputs_with(name, LARGE, tmp_path), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 * float(a.abs().max()))


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_maps_without_rows_or_columns(size: tuple[int, int]) -> None:
    x = torch.randn(2, 6, *size).contiguous(memory_format=torch.channels_last)
    affine, weights = torch.randn(2, 24), (torch.randn(24, 6, 1, 1), torch.randn(24, 1, 3, 3))
    options = {"activation": maps.RELU, "backend": "cpu"}
    y, _ = op.forward(x, weights[0], affine, weights[1], **options)
    after = {**options, "y_activation": maps.RELU}
    h, pooled = op.activate(x, weights[0], affine, weights[1], affine, **after, want_pool=True)
    assert y.shape == h.shape == (2, 24, *size)
    assert pooled.isnan().all()
    given_ = (x, torch.zeros(6), weights[0], affine, torch.zeros(2, 24), weights[1], y, affine, torch.randn(6, 24))
    *gradients, coefficients = op.backward(*given_, grad=torch.ones_like(y), **after)
    assert all(not gradient.any() for gradient in (*gradients, *coefficients[1:]))
    assert torch.equal(coefficients[0], affine[0])


def test_an_expansion_of_other_channels_is_an_error() -> None:
    x = maps.channels_last(torch.randn(1, 6, 5, 5))
    with pytest.raises(RuntimeError, match=r"expand_weight: expected \(20, 6, 1, 1\)"):
        op.forward(x, torch.randn(20, 5, 1, 1), torch.randn(2, 20), torch.randn(20, 1, 3, 3), backend="cpu")


def test_weights_of_another_dtype_are_an_error() -> None:
    x, affine = maps.channels_last(torch.randn(1, 6, 5, 5)), torch.randn(2, 20)
    expand_weight, weight = torch.randn(20, 6, 1, 1), torch.randn(20, 1, 3, 3)
    with pytest.raises(RuntimeError, match="expand_weight: expected the accumulation dtype"):
        op.forward(x, packed(expand_weight.double()), affine, weight, backend="cpu")
    with pytest.raises(RuntimeError, match="weight: expected the accumulation dtype"):
        op.forward(x, expand_weight, affine, taps_first(weight.double()), backend="cpu")
