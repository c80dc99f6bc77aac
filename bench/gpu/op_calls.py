"""Arguments of every op that has kernels for GPUs, for maps of one shape, as a block of the network would give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import reference as batch_norm
from biasloss_ext.ops.bias_loss import reference as bias_loss
from biasloss_ext.ops.library import accumulation_dtype

EPS = 1e-3
WRITTEN = ("running_mean", "running_var", "num_batches_tracked")


class Shape(NamedTuple):
    """Of a block: input channels, output channels, height and width, kernel and stride of its depthwise convolution."""

    samples: int
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int
    classes: int = 10


class Call(NamedTuple):
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def to(self, change: Callable[[Tensor], Tensor]) -> Call:
        """With every tensor changed; what the op writes is copied."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        options = {name: changed(value.clone() if name in WRITTEN else value) for name, value in self.options.items()}
        return Call(tuple(changed(value) for value in self.arguments), options)


class _Draw:
    """Random values, the same on every device."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.wide = shape, dtype, accumulation_dtype(dtype)
        self.generator = torch.Generator().manual_seed(sum(shape))

    def values(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.wide)

    def map(self, channels: int, size: int | None = None) -> Tensor:
        size = self.shape.size if size is None else size
        drawn = torch.randn(self.shape.samples, channels, size, size, generator=self.generator)
        return maps.channels_last((drawn * 1.5 + 0.5).to(self.dtype))

    def norm(self, channels: int) -> dict[str, Any]:
        return {
            "norm_weight": 1 + 0.2 * self.values(channels),
            "norm_bias": self.values(channels),
            "running_mean": self.values(channels),
            "running_var": self.values(channels).square() + 0.1,
            "num_batches_tracked": torch.tensor(3),
            "eps": EPS,
        }

    def before(self, y: Tensor) -> dict[str, Any]:
        """Affine and moments of a map whose normalization an op finishes."""
        weight, bias = 1 + 0.2 * self.values(y.shape[1]), self.values(y.shape[1])
        statistics = maps.statistics_of(y, norm_weight=weight, norm_bias=bias, eps=EPS)
        return {"affine": statistics[2:], "moments": statistics[:2], "eps": EPS}


def calls(shape: Shape, dtype: torch.dtype) -> list[tuple[str, Call]]:
    """(name of the op, its arguments), on the CPU."""
    draw = _Draw(shape, dtype)
    return [*_norms(draw), *_pointwise(draw), *_depthwise(draw), *_pools(draw), *_gates(draw), *_losses(draw)]


def _norms(draw: _Draw) -> list[tuple[str, Call]]:
    channels = draw.shape.channels
    y, grad, residual = (draw.map(channels) for _ in range(3))
    before = draw.before(y)
    affine, moments = before["affine"], before["moments"]
    act = {"activation": maps.HARDSWISH}
    count = y.numel() // max(channels, 1)
    return [
        ("batch_norm_statistics", Call((y,), draw.norm(channels))),
        ("batch_norm_affine", Call((moments, count), draw.norm(channels))),
        ("batch_norm_apply", Call((y, affine), {**act, "residual": residual})),
        ("batch_norm_coefficients", Call((grad, y, affine, moments), {**act, "eps": EPS})),
        ("batch_norm_backward", Call((grad, y, affine, draw.values(6, channels)), act)),
    ]


def _pointwise(draw: _Draw) -> list[tuple[str, Call]]:
    shape = draw.shape
    x, x_like = draw.map(shape.channels), draw.map(shape.channels)
    y, grad = draw.map(shape.outputs), draw.map(shape.outputs)
    weight = draw.values(shape.outputs, shape.channels, 1, 1) / shape.channels**0.5
    before = {**draw.before(x), "activation": maps.HARDSWISH}
    affine = {name: before[name] for name in ("affine", "activation")}
    gate = {"gate": draw.values(shape.samples, shape.channels).sigmoid()}
    after = {"y": y, "y_coefficients": draw.values(6, shape.outputs)}
    epilogue = {"bias": draw.values(shape.outputs), "output_activation": maps.RELU, "residual": y}
    of_y = draw.before(y)
    summing_to_zero = batch_norm.batch_norm_coefficients(grad, y, of_y["affine"], of_y["moments"], eps=EPS)
    plain = {"y": y, "y_coefficients": summing_to_zero, "residual_grad": x_like, "any_origin": True}
    return [
        ("pointwise", Call((x, weight), {**affine, **gate, "want_statistics": True, **draw.norm(shape.outputs)})),
        ("pointwise", Call((x, weight), epilogue)),
        ("pointwise_backward", Call((grad, x, weight), {**after, **before})),
        ("pointwise_backward", Call((grad, x, weight), {**after, **before, **gate})),
        ("pointwise_backward", Call((grad, x, weight), plain)),
    ]


def _depthwise(draw: _Draw) -> list[tuple[str, Call]]:
    shape = draw.shape
    channels, side = shape.channels, -(-shape.size // shape.stride)
    x, weight = draw.map(channels), draw.values(channels, 1, shape.kernel, shape.kernel)
    y, grad = draw.map(channels, side), draw.map(channels, side)
    before = {**draw.before(x), "activation": maps.HARDSWISH, "stride": shape.stride}
    forward = {name: before[name] for name in ("affine", "activation", "stride")}
    after = {
        "grad": grad,
        "pool_grad": draw.values(shape.samples, channels),
        "y": y,
        "y_affine": draw.before(y)["affine"],
        "y_coefficients": draw.values(6, channels),
        "y_activation": maps.RELU,
    }
    return [
        ("depthwise", Call((x, weight), {**forward, "want_statistics": True, **draw.norm(channels)})),
        ("depthwise_backward", Call((x, weight), {**after, **before})),
        ("depthwise_backward", Call((x, weight), {"grad": grad, "stride": shape.stride})),
    ]


def _pools(draw: _Draw) -> list[tuple[str, Call]]:
    shape = draw.shape
    x, pool_grad = draw.map(shape.channels), draw.values(shape.samples, shape.channels)
    before = {**draw.before(x), "activation": maps.HARDSWISH}
    forward = {"affine": before["affine"], "activation": maps.HARDSWISH, "want_variance": True}
    return [("pool_variance", Call((x,), forward)), ("pool_variance_backward", Call((pool_grad, x), before))]


def _gates(draw: _Draw) -> list[tuple[str, Call]]:
    samples, channels, hidden = draw.shape.samples, draw.shape.channels, max(draw.shape.channels // 4, 1)
    pooled, gate_grad = draw.values(samples, channels), draw.values(samples, channels)
    reduce_weight, expand_weight = draw.values(hidden, channels), draw.values(channels, hidden)
    reduce_bias, expand_bias = draw.values(hidden), draw.values(channels)
    reduced = pooled @ reduce_weight.T + reduce_bias
    expanded = reduced.relu() @ expand_weight.T + expand_bias
    act = {"activation": maps.RELU, "gate_activation": maps.HARDSIGMOID}
    finish = {
        "sums": draw.values(4, samples, channels),
        **draw.before(draw.map(channels)),
        "positions": draw.shape.size**2,
    }
    matrices = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    saved = (gate_grad, pooled, reduced, expanded, reduce_weight, expand_weight)
    return [
        ("squeeze_excite", Call((pooled, *matrices), act)),
        ("squeeze_excite_backward", Call(saved, {**act, **finish})),
    ]


def _losses(draw: _Draw) -> list[tuple[str, Call]]:
    shape = draw.shape
    features = draw.map(shape.channels)
    # Samples of different deviation, so that the weights do not rest on the last digits.
    features = features * torch.linspace(0.5, 2, shape.samples, dtype=draw.dtype)[:, None, None, None]
    scores = (3 * draw.values(shape.samples, shape.classes)).to(draw.dtype)
    target = torch.randint(shape.classes, (shape.samples,), generator=draw.generator)
    after = (0.3, 0.3, True, bias_loss.MEAN, -100, 0.1)
    forward = (features, None, None, scores, target, None, None, *after)
    loss, weight, statistics = bias_loss.bias_loss(*forward)
    backward = (torch.full_like(loss, 0.7), scores, target, None, weight, statistics, *after[3:])
    return [
        ("feature_variance", Call((features,), {})),
        ("bias_loss", Call(forward, {})),
        ("bias_loss_backward", Call(backward, {})),
    ]
