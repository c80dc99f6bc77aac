"""Runs the depthwise kernels in the simulator on torch tensors, and says how far they may be from float64."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import cases
import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import reference
from biasloss_ext.ops.depthwise.op import output_size


@dataclasses.dataclass
class Case:
    """Maps are (N, C, H, W), channels_last."""

    x: Tensor
    weight: Tensor
    affine: Tensor | None
    activation: int
    stride: int

    def forward_arguments(self, dtype: torch.dtype) -> list[Any]:
        affine = None if self.affine is None else self.affine.to(dtype)
        return [self.x.to(dtype), self.weight.to(dtype), affine, self.activation, self.stride]

    def output_shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = self.x.shape
        return n, c, output_size(h, self.stride), output_size(w, self.stride)


@dataclasses.dataclass
class BackwardCase:
    case: Case
    grad: Tensor | None
    pool_grad: Tensor | None
    y: Tensor | None
    y_affine: Tensor | None
    y_coefficients: Tensor | None
    y_activation: int
    center: Tensor | None

    def arguments(self, dtype: torch.dtype) -> list[Any]:
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        x, weight, affine, activation, stride = self.case.forward_arguments(dtype)
        before = [wide(t) for t in (self.grad, self.pool_grad, self.y, self.y_affine, self.y_coefficients)]
        return [*before, self.y_activation, x, weight, affine, wide(self.center), activation, stride, True, True]


def make_map(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, offset: int = 0) -> Tensor:
    """Normal values; `offset` elements after a 16-byte boundary."""
    n, c, h, w = shape
    storage = torch.zeros(offset + n * c * h * w, dtype=dtype)
    x = storage[offset:].view(n, h, w, c).permute(0, 3, 1, 2)
    return x.copy_(torch.randn(n, c, h, w, generator=generator))


def make_case(
    shape: tuple[int, int, int, int],
    kernel: int,
    stride: int,
    dtype: torch.dtype = torch.float32,
    activation: int = maps.HARDSWISH,
    with_affine: bool = True,
    offset: int = 0,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    wide, c = cases.accumulator(dtype), shape[1]
    affine = torch.stack((torch.rand(c, generator=g) + 0.5, torch.randn(c, generator=g))).to(wide)
    weight = torch.randn(c, 1, kernel, kernel, generator=g).to(wide)
    return Case(make_map(shape, dtype, g, offset), weight, affine if with_affine else None, activation, stride)


def make_backward_case(
    case: Case,
    with_grad: bool = True,
    with_pool: bool = True,
    with_y: bool = True,
    with_y_affine: bool = True,
    with_center: bool = True,
    y_activation: int = maps.HARDSWISH,
    offset: int = 0,
) -> BackwardCase:
    g = torch.Generator().manual_seed(1)
    dtype, wide, (n, c, *_) = case.x.dtype, case.weight.dtype, case.x.shape
    channel_rows = torch.randn(7, c, generator=g).to(wide)
    return BackwardCase(
        case,
        grad=make_map(case.output_shape(), dtype, g, offset) if with_grad or not with_y else None,
        pool_grad=torch.randn(n, c, generator=g).to(wide) if with_pool and with_y else None,
        y=make_map(case.output_shape(), dtype, g, offset) if with_y else None,
        y_affine=channel_rows[:2].contiguous() if with_y and with_y_affine else None,
        y_coefficients=channel_rows[2:6].contiguous() if with_y else None,
        y_activation=y_activation if with_y else maps.IDENTITY,
        center=channel_rows[6].contiguous() if with_center else None,
    )


def rows_of(t: Tensor | None) -> Any:
    """A map as (N, H, W, C), which is how it lies in memory."""
    return None if t is None else cases.as_array(t.permute(0, 2, 3, 1))


def machine(simulator: ModuleType, schedule: dict[str, Any] | None = None, **options: int) -> Any:
    return simulator.Machine(schedule=simulator.Schedule(**(schedule or {})), **options)


def unwritten(like: Tensor, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    return make_map(shape, like.dtype, torch.Generator(), offset).fill_(torch.nan)


def simulate(simulator: ModuleType, case: Case, on: Any, want_moments: bool = True) -> tuple[Tensor, Tensor | None]:
    y = unwritten(case.x, case.output_shape())
    moments = case.weight.new_full((2, case.x.shape[1]), torch.nan) if want_moments else None
    simulator.depthwise(
        x=rows_of(case.x),
        weight=case.weight.squeeze(1).numpy(),
        affine=cases.as_array(case.affine),
        activation=case.activation,
        stride=case.stride,
        y=rows_of(y),
        moments=cases.as_array(moments),
        dtype=cases.NAMES[case.x.dtype],
        machine=on,
    )
    return y, moments


def simulate_backward(
    simulator: ModuleType, b: BackwardCase, on: Any, want_x: bool = True, want_weight: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    case, channels = b.case, b.case.x.shape[1]
    grad_x = unwritten(case.x, tuple(case.x.shape)) if want_x else None
    grad_weight = torch.full_like(case.weight, torch.nan) if want_weight else None
    sums = case.weight.new_full((2, channels), torch.nan) if b.center is not None else None
    rows = {"affine": case.affine, "center": b.center, "y_affine": b.y_affine, "y_coefficients": b.y_coefficients}
    simulator.depthwise_backward(
        **{name: cases.as_array(t) for name, t in rows.items()},
        **{name: rows_of(t) for name, t in {"grad": b.grad, "y": b.y, "x": case.x, "grad_x": grad_x}.items()},
        pool_grad=cases.as_array(b.pool_grad),
        weight=case.weight.squeeze(1).numpy(),
        y_activation=b.y_activation,
        activation=case.activation,
        stride=case.stride,
        grad_weight=None if grad_weight is None else grad_weight.squeeze(1).numpy(),
        sums=cases.as_array(sums),
        dtype=cases.NAMES[case.x.dtype],
        machine=on,
    )
    return grad_x, grad_weight, sums


def assert_near(got: Tensor, want: Tensor, plain: Tensor, magnitude: Tensor | float = 0.0) -> None:
    """Twice the error of `plain`, torch's own in the accumulation dtype, and the rounding of what is stored.

    `magnitude`: what the terms of a sum add up to without their signs; one rounding of it is allowed besides, as torch's own
    error may happen to be none.
    """
    accumulation = torch.finfo(cases.accumulator(got.dtype)).eps
    stored = torch.finfo(got.dtype).eps / 2 if got.element_size() == 2 else 0.0
    largest = float(want.abs().max())
    allowed = stored * 1.01 * want.abs() + 2 * (plain.double() - want).abs().max() + 2 * accumulation * largest
    error = (got.double() - want).abs()
    allowed = allowed + accumulation * magnitude + torch.finfo(got.dtype).tiny
    assert bool((error <= allowed).all()), f"error {float(error.max())}, allowed there {float(allowed.max())}"


def check_forward(case: Case, y: Tensor, moments: Tensor | None) -> None:
    want, _ = reference.depthwise(*case.forward_arguments(torch.float64), False)
    plain, _ = reference.depthwise(*case.forward_arguments(case.weight.dtype), False)
    x, weight, affine, activation, stride = case.forward_arguments(torch.float64)
    h = maps.activate(maps.normalised(x, affine), activation).abs()
    assert_near(y, want, plain, reference.convolve(h, weight.abs(), stride))
    if moments is not None:
        wide = maps.moments_of(y.double())
        plain_moments = maps.moments_of(y.to(moments.dtype))
        assert_near(moments[0], wide[0], plain_moments[0], y.double().abs().mean((0, 2, 3)))
        # Means are merged as they are rounded: an error of their last place times a deviation.
        assert_near(moments[1], wide[1], plain_moments[1], wide[0].abs() * wide[1].sqrt() + wide[1])


def check_backward(b: BackwardCase, grad_x: Tensor | None, grad_weight: Tensor | None, sums: Tensor | None) -> None:
    want = reference.depthwise_backward(*b.arguments(torch.float64))
    plain = reference.depthwise_backward(*b.arguments(b.case.weight.dtype))
    # What dh and the gradient of the weight add up, without signs.
    dy = reference.gradient_at_output(*b.arguments(torch.float64)[:6]).abs()
    x, weight, affine, activation, stride = b.case.forward_arguments(torch.float64)
    h = maps.activate(maps.normalised(x, affine), activation).abs()
    dh, of_weight, _ = reference.gradients(dy, h, weight.abs(), None, maps.IDENTITY, stride)
    if grad_x is not None:
        assert_near(grad_x, want[0], plain[0], dh)
    if grad_weight is not None:
        assert_near(grad_weight, want[1], plain[1], of_weight)
    if sums is not None:
        assert b.center is not None
        offset = (x - maps.per_channel(b.center.double())).abs()
        magnitude = torch.stack((dh.sum((0, 2, 3)), (dh * offset).sum((0, 2, 3))))
        assert_near(sums, want[2], plain[2], magnitude)
