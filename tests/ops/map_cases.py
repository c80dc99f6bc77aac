"""Feature maps that tests of the blocks' ops draw, and their truth in float64, written from the formulas."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops import maps
from tests import oracle

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = [of_torch.function for of_torch in maps.OF_TORCH]
# F.hardsigmoid's own gradient has a float32 constant in it, in float64 too.
ACTIVATIONS[maps.HARDSIGMOID] = lambda u: F.relu6(u + 3) / 6
KINKS = [of_torch.kinks for of_torch in maps.OF_TORCH]
# Of maps: all but the gates of squeeze-and-excitation.
MAP_ACTIVATIONS = tuple(int(a) for a in maps.Activation if a not in (maps.HARDSIGMOID, maps.SIGMOID))
CHANNELS = (1, 2, 3, 5, 8, 16, 24, 40, 63, 72, 121, 130, 257)


@dataclass
class Case:
    x: Tensor
    affine: Tensor  # u has about mean 0 and standard deviation 1
    center: Tensor  # about the mean of x
    activation: int
    generator: torch.Generator = field(repr=False)

    def map_like(self, shape: torch.Size | None = None) -> Tensor:
        values = torch.randn(shape or self.x.shape, generator=self.generator, dtype=torch.float64)
        return channels_last(values.to(self.x.dtype))

    def per_channel(self, rows: int) -> Tensor:
        values = torch.randn(rows, self.x.shape[1], generator=self.generator, dtype=torch.float64)
        return values.to(self.affine.dtype)

    def moments(self) -> Tensor:
        """About those of x, so that errors show that cancel for exact ones."""
        variance = torch.rand(self.x.shape[1], generator=self.generator, dtype=torch.float64) + 0.5
        return torch.stack((self.center, variance.to(self.affine.dtype)))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.double() for t in tensors]


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1], 1, 1)


def away_from_kinks(x: Tensor, affine: Tensor, activation: int) -> Tensor:
    """x, with values whose u is so near a kink of the activation that rounding decides its side moved off to u = 1."""
    scale, shift = column(affine[0].double()), column(affine[1].double())
    u = x.double() * scale + shift
    near = torch.zeros_like(u, dtype=torch.bool)
    for kink in KINKS[activation]:
        near |= (u - kink).abs() < 1e-5 * (1 + shift.abs())
    return channels_last(torch.where(near, (1 - shift) / scale, x.double()).to(x.dtype))


@st.composite
def cases(draw: st.DrawFn, samples: tuple[int, ...] = (0, 1, 2, 3), ratio: tuple[float, ...] = (0, 3, 100)) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.sampled_from(samples)), draw(st.sampled_from(CHANNELS)), *draw(st.sampled_from(SIZES)))
    dtype, activation = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(MAP_ACTIVATIONS))
    mean = draw(st.sampled_from(ratio)) * torch.randn(shape[1], generator=generator, dtype=torch.float64).sign()
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + column(mean)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    affine = torch.stack((scale, 0.3 - mean * scale)).to(accumulate)
    x = away_from_kinks(x.to(dtype), affine, activation)
    return Case(x, affine, (mean + 0.1).to(accumulate), activation, generator)


SIZES = ((1, 1), (2, 3), (7, 7), (1, 40), (14, 13))


def activated(x: Tensor, affine: Tensor, activation: int) -> Tensor:
    """In the dtype of x."""
    result: Tensor = ACTIVATIONS[activation](x * column(affine[0]) + column(affine[1]))
    return result


def gradient_at_u(grad: Tensor, x: Tensor, affine: Tensor, activation: int) -> Tensor:
    """By autograd."""
    u = (x * column(affine[0]) + column(affine[1])).requires_grad_()
    h = ACTIVATIONS[activation](u)
    return torch.autograd.grad(h, u, grad)[0] if activation else grad


def sums(du: Tensor, x: Tensor, center: Tensor) -> Tensor:
    return torch.stack((du.sum((0, 2, 3)), (du * (x - column(center))).sum((0, 2, 3))))


def coefficients(du: Tensor, x: Tensor, affine: Tensor, moments: Tensor, eps: float, frozen: bool) -> Tensor:
    """(6, C) by the formulas of `biasloss_ext.ops.maps`."""
    count, rstd, scale = x.numel() // x.shape[1], 1 / (moments[1] + eps).sqrt(), affine[0]
    du_sum, du_centered = sums(du, x, moments[0])
    constant = frozen or count == 0
    b = torch.zeros_like(scale) if constant else -scale * rstd**2 * du_centered / count
    c = torch.zeros_like(scale) if constant else -scale * du_sum / count
    return torch.stack((scale, b, c, moments[0], rstd * du_centered, du_sum))


def assert_coefficients(
    ours: Tensor,
    own: Tensor,
    du: Tensor,
    x: Tensor,
    given: tuple[Tensor, Tensor],
    eps: float,
    frozen: bool,
    error: float,
) -> None:
    """Each row against float64, rounded like a few of its terms, each with ``error`` roundings of du in it.

    Args:
        own: torch's.
        given: affine and moments.
    """
    affine, moments = (t.double() for t in given)
    truth = coefficients(du, x, affine, moments, eps, frozen)
    assert ours.shape == truth.shape
    assert ours.dtype == own.dtype
    assert torch.equal(ours[0], own[0])
    assert torch.equal(ours[3], own[3])
    if frozen:
        assert not ours[1:3].any()
    count, rstd, scale = max(x.numel() // x.shape[1], 1), 1 / (moments[1] + eps).sqrt(), affine[0]
    plain = du.abs().sum((0, 2, 3))
    centered = (du * (x - column(moments[0]))).abs().sum((0, 2, 3)) + 0.1 * plain
    terms = {1: scale * rstd**2 * centered / count, 2: scale * plain / count, 4: rstd * centered, 5: plain}
    for row, size in terms.items():
        largest = error * size.abs().max().item()
        oracle.assert_as_close_as_torch(ours[row], truth[row], own[row], largest, f"row {row} of the coefficients")
