"""Kernels of batch normalization and of the pool, and the merges of their last programs: tiles, groups and chunks beyond the
first, widths that are no power of two, means far from zero."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from biasloss_ext.ops import maps, triton_launch
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.batch_norm import reference as batch_norm_reference
from biasloss_ext.ops.batch_norm import triton as batch_norm
from biasloss_ext.ops.pool_variance import reference as pool_reference
from biasloss_ext.ops.pool_variance import triton as pool
from biasloss_ext.ops.triton_finish import columns_from, is_last, merge_moments, merge_sums
from tests.ops.map_cases import MAP_ACTIVATIONS
from tests.triton_interpreter.against_reference import assert_matches, parameter, random_map

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = ((3, 24, 7, 7), (1, 5, 3, 5), (2, 72, 9, 3), (4, 1, 1, 1), (2, 200, 1, 1))
CASES = [(shape, dtype) for shape in SHAPES for dtype in (F32, F16)] + [((2, 24, 5, 3), dtype) for dtype in (BF16, F64)]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for each of several groups of rows, without a large map."""
    monkeypatch.setattr(shared, "WANTED_PROGRAMS", 3)


def affine_of(channels: int, dtype: torch.dtype) -> Tensor:
    return parameter(2, channels, dtype=dtype)


def moments_of(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.stack((parameter(channels, dtype=dtype), 0.1 + parameter(channels, dtype=dtype).abs()))


def norm_of(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    names = ("norm_weight", "norm_bias", "running_mean", "running_var")
    counter = {"num_batches_tracked": torch.tensor(3)}
    return {**{name: parameter(channels, dtype=dtype) for name in names}, **counter, "momentum": 0.3, "eps": 1e-3}


def matches(name: str, arguments: tuple[Any, ...], roundings: float = 5, **options: Any) -> tuple[Tensor, ...]:
    """An op of either family against its reference; nothing is left of the tickets."""
    family, reference = (batch_norm, batch_norm_reference) if name.startswith("batch") else (pool, pool_reference)
    outputs = assert_matches(getattr(family, name), getattr(reference, name), arguments, options, roundings)
    assert not any(counters.any() for counters in triton_launch._of_stream.values())
    return outputs


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_batch_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    channels = shape[1]
    y, grad, residual = (random_map(*shape, dtype=dtype) for _ in range(3))
    affine, moments, coefficients = affine_of(channels, dtype), moments_of(channels, dtype), parameter(6, channels)
    coefficients = coefficients.to(affine.dtype)
    matches("batch_norm_statistics", (y,), 10, **norm_of(channels, dtype))
    matches("batch_norm_statistics", (y,), 10)
    matches("batch_norm_affine", (moments, 7), **norm_of(channels, dtype))
    for activation in MAP_ACTIVATIONS if dtype == F32 and channels == 24 else (maps.HARDSWISH,):
        matches("batch_norm_apply", (y, affine), activation=activation, residual=residual)
        matches("batch_norm_apply", (y, affine), activation=activation)
        matches("batch_norm_coefficients", (grad, y, affine, moments), activation=activation, eps=1e-3)
        matches("batch_norm_backward", (grad, y, affine, coefficients), activation=activation)
    matches("batch_norm_coefficients", (grad, y, affine, moments), activation=maps.RELU, frozen=True)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, affine, moments = random_map(*shape, dtype=dtype), affine_of(shape[1], dtype), moments_of(shape[1], dtype)
    pool_grad = parameter(*shape[:2], dtype=dtype)
    for activation in MAP_ACTIVATIONS if dtype == F32 and shape[1] == 24 else (maps.HARDSWISH,):
        with_affine = {"affine": affine, "activation": activation}
        matches("pool_variance", (x,), **with_affine, want_variance=True)
        matches("pool_variance_backward", (pool_grad, x), **with_affine, moments=moments, eps=1e-3)
    matches("pool_variance_backward", (pool_grad, x), affine=affine, moments=moments, frozen=True)
    matches("pool_variance", (x,))
    matches("pool_variance_backward", (pool_grad, x))


@pytest.mark.parametrize("dtype", [F32, F16])
def test_groups_of_tiles(dtype: torch.dtype, few_programs: None) -> None:
    torch.manual_seed(0)
    x, grad = random_map(2, 20, 27, 19, dtype=dtype), random_map(2, 20, 27, 19, dtype=dtype)
    affine, moments, pool_grad = affine_of(20, dtype), moments_of(20, dtype), parameter(2, 20)
    shape = shared.rows_of(x)
    tiles = shared.stream_of(shape, x, batch_norm.SUMMED_LOADS)
    groups = shared.groups_of(shape.rows, tiles.rows, tiles.blocks)
    assert groups.number > 1 and groups.tiles > 1 and shape.rows % tiles.rows
    cut = pool.cut_of(x)
    assert cut.chunks.number > 1 and cut.chunks.tiles > 1
    matches("batch_norm_statistics", (x,), **norm_of(20, dtype))
    matches("batch_norm_coefficients", (grad, x, affine, moments), activation=maps.SILU)
    matches("pool_variance", (x,), affine=affine, activation=maps.SILU, want_variance=True)
    matches("pool_variance_backward", (pool_grad, x), affine=affine, moments=moments, activation=maps.RELU6)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_means_far_from_zero(spread: float, few_programs: None) -> None:
    """Mean of 1000 standard deviations; with a spread between channels of 30, between samples of 60."""
    torch.manual_seed(0)
    x = random_map(3, 24, 20, 17, mean=1000, std=1.0)
    x += spread * torch.arange(24.0)[:, None, None] + 2 * spread * torch.arange(3.0)[:, None, None, None]
    x = x.contiguous(memory_format=torch.channels_last)
    exact = maps.moments_of(x.double())
    torch.testing.assert_close(batch_norm.batch_norm_statistics(x)[:2].double(), exact, rtol=2e-6, atol=0)
    exact_pool, exact_variance = pool_reference.pool_variance(x.double(), want_variance=True)
    pooled, variance = pool.pool_variance(x, want_variance=True)
    torch.testing.assert_close(pooled.double(), exact_pool, rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=2e-6, atol=0)


def test_large_constants_have_no_variance(few_programs: None) -> None:
    x = torch.full((2, 20, 27, 19), 1.1e30).contiguous(memory_format=torch.channels_last)
    assert not batch_norm.batch_norm_statistics(x)[1].any()
    assert not pool.pool_variance(x, want_variance=True)[1].any()


@triton.jit(do_not_specialize=["groups", "columns", "programs"])
def merging_kernel(
    moments_ptr,
    sums_ptr,
    merged_ptr,
    ticket_ptr,
    groups,
    columns,
    programs,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if is_last(ticket_ptr, programs):
        at = columns_from(0, columns, COLUMNS)
        mean, m2, count = merge_moments(moments_ptr, groups, at, GROUPS, COLUMNS, tl.float32)
        total = merge_sums(sums_ptr, groups, at, GROUPS, COLUMNS, tl.float32)
        tl.store(merged_ptr + at.column, mean, mask=at.exists)
        tl.store(merged_ptr + columns + at.column, m2 / (count - 1.0), mask=at.exists)
        tl.store(merged_ptr + columns * 2 + at.column, total, mask=at.exists)


@pytest.mark.parametrize("groups", [1, 5, 33, 300])
def test_merges_of_many_groups(groups: int) -> None:
    torch.manual_seed(groups)
    columns = 19
    values = torch.randn(groups, 7, columns) + torch.linspace(500, 600, groups)[:, None, None]
    values[-1, 3:] = torch.nan  # the last group is shorter
    rows = torch.full((groups,), 7.0)
    rows[-1] = 3
    shift = values[:, 0]
    mean = values.nanmean(1)
    m2 = (values - mean[:, None]).square().nansum(1)
    moments = torch.cat([shift.flatten(), (mean - shift).flatten(), m2.flatten(), rows])
    parts, merged, ticket = torch.randn(groups, columns), torch.full((3, columns), -1.0), torch.zeros(1).int()
    merging_kernel[(3,)](
        moments, parts, merged, ticket, groups, columns, 3, GROUPS=shared.merged_groups(groups, 32), COLUMNS=32
    )
    assert ticket.item() == 0
    flat = values.double().flatten(0, 1)
    flat = flat[~flat.isnan().any(1)]
    torch.testing.assert_close(merged[:2].double(), torch.stack((flat.mean(0), flat.var(0))), rtol=3e-5, atol=0)
    torch.testing.assert_close(merged[2].double(), parts.double().sum(0), rtol=1e-6, atol=1e-5)


def test_other_layouts_and_empty_maps() -> None:
    torch.manual_seed(0)
    x, affine, moments = torch.randn(2, 6, 4, 3), affine_of(6, F32), moments_of(6, F32)
    matches("batch_norm_apply", (x, affine), activation=maps.RELU, residual=x[:1].expand(2, 6, 4, 3))
    matches("batch_norm_coefficients", (x.flip(1), x, affine.flip(1), moments.t().contiguous().t()))
    matches("pool_variance", (x[:, :, ::2],), affine=affine, activation=maps.RELU, want_variance=True)
    for none in (x[:0], x[:, :, :0]):
        matches("batch_norm_statistics", (none,), **norm_of(6, F32))
        matches("batch_norm_coefficients", (none, none, affine, moments))
        matches("batch_norm_apply", (none, affine))
        matches("batch_norm_backward", (none, none, affine, parameter(6, 6)))
        matches("pool_variance_backward", (torch.zeros(none.shape[:2]), none), affine=affine, moments=moments)
    matches("batch_norm_affine", (moments, 0), **norm_of(6, F32))
    assert [t.shape for t in pool.pool_variance(x[:0], affine=affine, want_variance=True)] == [(0, 6), (0,)]


def test_not_a_number_is_kept() -> None:
    x = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    x[1, 1, 2, 2] = torch.nan
    affine = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert batch_norm.batch_norm_statistics(x).isnan().tolist() == [[False, True, False]] * 4
    for activation in MAP_ACTIVATIONS:
        assert batch_norm.batch_norm_apply(x, affine, activation=activation).isnan().sum() == 1
        pooled, variance = pool.pool_variance(x, affine=affine, activation=activation, want_variance=True)
        assert pooled.isnan().tolist() == [[False] * 3, [False, True, False]]
        assert variance.isnan().tolist() == [False, True]


def test_activations_at_their_kinks() -> None:
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0, -3.5, 7.0]).reshape(1, 1, 2, 3)
    affine, ones = torch.tensor([[1.0], [0.0]]), torch.ones(1, 1, 2, 3)
    coefficients = torch.tensor([[1.0], [0.0], [0.0], [0.0], [0.0], [0.0]])
    exact = kinks.double()  # the tails of GELU are small differences in torch's own float32
    for activation in (*MAP_ACTIVATIONS, maps.HARDSIGMOID, maps.SIGMOID):
        slope = batch_norm.batch_norm_backward(ones, kinks, affine, coefficients, activation=activation)
        torch.testing.assert_close(slope.double(), maps.derivative(exact, activation), rtol=1e-6, atol=2e-7)
        h = batch_norm.batch_norm_apply(kinks, affine, activation=activation)
        torch.testing.assert_close(h.double(), maps.activate(exact, activation), rtol=1e-6, atol=2e-7)


def test_unknown_activations_are_refused() -> None:
    x, affine = torch.zeros(1, 2, 3, 3), affine_of(2, F32)
    for call in (
        lambda: torch.ops.biasloss_ext.batch_norm_apply_triton(x, affine, activation=maps.LAST_ACTIVATION + 1),
        lambda: torch.ops.biasloss_ext.batch_norm_coefficients_triton(x, x, affine, affine, activation=-1),
        lambda: torch.ops.biasloss_ext.batch_norm_backward_triton(
            x, x, affine, parameter(6, 2), activation=maps.LAST_ACTIVATION + 1
        ),
        lambda: torch.ops.biasloss_ext.pool_variance_triton(x, activation=maps.LAST_ACTIVATION + 1),
        lambda: torch.ops.biasloss_ext.pool_variance_backward_triton(
            x[:, :, 0, 0], x, activation=maps.LAST_ACTIVATION + 1
        ),
    ):
        with pytest.raises(ValueError, match="supported: 0 \\(identity\\)"):
            call()
