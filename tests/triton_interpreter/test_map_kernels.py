"""Kernels of batch normalisation and of the pool, and the merging kernels behind all: tiles, groups and chunks beyond the
first, widths that are no power of two, means far from zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_interpreter.against_reference import assert_matches, parameter, random_map

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.batch_norm import reference as batch_norm_reference
from biasloss_ext.ops.batch_norm import triton as batch_norm
from biasloss_ext.ops.pool_variance import reference as pool_reference
from biasloss_ext.ops.pool_variance import triton as pool

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = ((3, 24, 7, 7), (1, 5, 3, 5), (2, 72, 9, 3), (4, 1, 1, 1), (2, 200, 1, 1))
CASES = [(shape, dtype) for shape in SHAPES for dtype in (F32, F16)] + [((2, 24, 5, 3), dtype) for dtype in (BF16, F64)]
MAP_ACTIVATIONS = (maps.IDENTITY, maps.RELU, maps.RELU6, maps.HARDSWISH, maps.SILU)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for each of several groups of rows, without a large map."""
    monkeypatch.setattr(shared, "WANTED_PROGRAMS", 3)


def affine_of(channels: int, dtype: torch.dtype) -> Tensor:
    return parameter(2, channels, dtype=dtype)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_batch_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    channels = shape[1]
    y, grad, residual = (random_map(*shape, dtype=dtype) for _ in range(3))
    affine, center = affine_of(channels, dtype), parameter(channels, dtype=dtype)
    coefficients = parameter(4, channels, dtype=dtype)
    assert_matches(batch_norm.batch_norm_moments, batch_norm_reference.batch_norm_moments, (y,))
    for activation in MAP_ACTIVATIONS if dtype == F32 and channels == 24 else (maps.HARDSWISH,):
        apply, sums, backward = (getattr(batch_norm, f"batch_norm_{n}") for n in ("apply", "sums", "backward"))
        assert_matches(apply, batch_norm_reference.batch_norm_apply, (y, affine, activation, residual))
        assert_matches(apply, batch_norm_reference.batch_norm_apply, (y, affine, activation, None))
        assert_matches(sums, batch_norm_reference.batch_norm_sums, (grad, y, affine, center, activation))
        assert_matches(backward, batch_norm_reference.batch_norm_backward, (grad, y, affine, coefficients, activation))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, affine = random_map(*shape, dtype=dtype), affine_of(shape[1], dtype)
    pool_grad, center = parameter(*shape[:2], dtype=dtype), parameter(shape[1], dtype=dtype)
    forward, backward = pool.pool_variance, pool.pool_variance_backward
    for activation in MAP_ACTIVATIONS if dtype == F32 and shape[1] == 24 else (maps.HARDSWISH,):
        assert_matches(forward, pool_reference.pool_variance, (x, affine, activation, True))
        assert_matches(backward, pool_reference.pool_variance_backward, (pool_grad, x, affine, center, activation))
    assert_matches(forward, pool_reference.pool_variance, (x, None, maps.IDENTITY, False))
    assert_matches(backward, pool_reference.pool_variance_backward, (pool_grad, x, None, None, maps.IDENTITY))


@pytest.mark.parametrize("dtype", [F32, F16])
def test_groups_of_tiles(dtype: torch.dtype, few_programs: None) -> None:
    torch.manual_seed(0)
    x, grad = random_map(2, 20, 27, 19, dtype=dtype), random_map(2, 20, 27, 19, dtype=dtype)
    affine, center, pool_grad = affine_of(20, dtype), parameter(20), parameter(2, 20)
    shape = shared.rows_of(x)
    tiles = shared.stream_of(shape, x, batch_norm.SUMMED_LOADS)
    groups = shared.groups_of(shape.rows, tiles.rows, tiles.blocks)
    assert groups.number > 1 and groups.tiles > 1 and shape.rows % tiles.rows
    cut = pool.cut_of(x)
    assert cut.chunks.number > 1 and cut.chunks.tiles > 1
    assert_matches(batch_norm.batch_norm_moments, batch_norm_reference.batch_norm_moments, (x,))
    assert_matches(
        batch_norm.batch_norm_sums, batch_norm_reference.batch_norm_sums, (grad, x, affine, center, maps.SILU)
    )
    assert_matches(pool.pool_variance, pool_reference.pool_variance, (x, affine, maps.SILU, True))
    arguments = (pool_grad, x, affine, center, maps.RELU6)
    assert_matches(pool.pool_variance_backward, pool_reference.pool_variance_backward, arguments)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_means_far_from_zero(spread: float, few_programs: None) -> None:
    """Mean of 1000 standard deviations; with a spread between channels of 30, between samples of 60."""
    torch.manual_seed(0)
    x = random_map(3, 24, 20, 17, mean=1000, std=1.0)
    x += spread * torch.arange(24.0)[:, None, None] + 2 * spread * torch.arange(3.0)[:, None, None, None]
    x = x.contiguous(memory_format=torch.channels_last)
    exact = batch_norm_reference.batch_norm_moments(x.double())
    torch.testing.assert_close(batch_norm.batch_norm_moments(x).double(), exact, rtol=2e-6, atol=0)
    exact_pool, exact_variance = pool_reference.pool_variance(x.double(), None, maps.IDENTITY, True)
    pooled, variance = pool.pool_variance(x, None, maps.IDENTITY, True)
    torch.testing.assert_close(pooled.double(), exact_pool, rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=2e-6, atol=0)


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
    partials = torch.cat([shift.flatten(), (mean - shift).flatten(), m2.flatten(), rows])
    merged = torch.empty(2, columns)
    shared.merge_moments(partials, merged[0], merged[1], groups, columns, unbiased=True)
    flat = values.double().flatten(0, 1)
    flat = flat[~flat.isnan().any(1)]
    torch.testing.assert_close(merged.double(), torch.stack((flat.mean(0), flat.var(0))), rtol=3e-5, atol=0)
    sums = torch.empty(2, columns)
    parts = torch.randn(2, groups, columns)
    shared.sum_partials(parts, sums, 2, groups, columns)
    torch.testing.assert_close(sums.double(), parts.double().sum(1), rtol=1e-6, atol=1e-5)


def test_other_layouts_and_empty_maps() -> None:
    torch.manual_seed(0)
    x, affine = torch.randn(2, 6, 4, 3), affine_of(6, F32)
    assert_matches(
        batch_norm.batch_norm_apply,
        batch_norm_reference.batch_norm_apply,
        (x, affine, maps.RELU, x[:1].expand(2, 6, 4, 3)),
    )
    assert_matches(pool.pool_variance, pool_reference.pool_variance, (x[:, :, ::2], affine, maps.RELU, True))
    assert batch_norm.batch_norm_moments(x[:0]).tolist() == [[0.0] * 6] * 2
    assert batch_norm.batch_norm_apply(x[:0], affine, maps.RELU, None).shape == (0, 6, 4, 3)
    assert batch_norm.batch_norm_sums(x[:0], x[:0], affine, affine[0], maps.RELU).tolist() == [[0.0] * 6] * 2
    assert [t.shape for t in pool.pool_variance(x[:0], affine, maps.RELU, True)] == [(0, 6), (0,)]
    grad_x, sums = pool.pool_variance_backward(torch.zeros(0, 6), x[:0], affine, affine[0], maps.RELU)
    assert grad_x.shape == (0, 6, 4, 3) and sums.tolist() == [[0.0] * 6] * 2


def test_not_a_number_is_kept() -> None:
    x = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    x[1, 1, 2, 2] = torch.nan
    affine = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert batch_norm.batch_norm_moments(x).isnan().tolist() == [[False, True, False]] * 2
    for activation in MAP_ACTIVATIONS:
        assert batch_norm.batch_norm_apply(x, affine, activation, None).isnan().sum() == 1
        pooled, variance = pool.pool_variance(x, affine, activation, True)
        assert pooled.isnan().tolist() == [[False] * 3, [False, True, False]]
        assert variance.isnan().tolist() == [False, True]


def test_activations_at_their_kinks() -> None:
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0, -3.5, 7.0]).reshape(1, 1, 2, 3)
    affine, ones = torch.tensor([[1.0], [0.0]]), torch.ones(1, 1, 2, 3)
    coefficients = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    for activation in (*MAP_ACTIVATIONS, maps.HARDSIGMOID, maps.SIGMOID):
        slope = batch_norm.batch_norm_backward(ones, kinks, affine, coefficients, activation)
        torch.testing.assert_close(slope, maps.derivative(kinks, activation), rtol=1e-6, atol=1e-7)
        h = batch_norm.batch_norm_apply(kinks, affine, activation, None)
        torch.testing.assert_close(h, maps.activate(kinks, activation), rtol=1e-6, atol=1e-7)
