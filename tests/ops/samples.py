"""Arguments for every op, of which the generated tests are made. A new op adds its own here; a test fails where one has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops import backends, maps
from biasloss_ext.ops.bias_loss import reference as bias_loss
from biasloss_ext.ops.expand_depthwise import reference as expand_reference
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.program.code import Instruction, Operation
from biasloss_ext.ops.registry import OPS
from tests.calls import Call

SAMPLES, CHANNELS, OUTPUTS, HEIGHT, WIDTH = 2, 5, 6, 4, 3
EPS = 1e-3
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def runs(*, kernels: bool = False) -> list[tuple[str, str]]:
    """Every op with each backend that can run here on CPU tensors, or those with kernels alone."""
    device = torch.device("cpu")
    return [
        (name, backend)
        for name, op in OPS.items()
        for backend in op.backends
        if backends.why_not(backend, device, name) is None and not (kernels and backend == "reference")
    ]


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """What `torch.ops.biasloss_ext` has of an op for a backend with kernels."""
    op = OPS[name]
    found = op.triton if backend == "triton" else op.native
    assert found is not None
    return found


class _Source:
    """Tensors of one dtype for maps and what belongs to them. Moments, affine and statistics are the maps' own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.dtype, self.wide = dtype, accumulation_dtype(dtype)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.wide)

    def map(self, channels: int = CHANNELS, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
        drawn = torch.randn(SAMPLES, channels, height, width, generator=self.generator, dtype=torch.float64)
        return maps.channels_last((1.5 * drawn + 0.5).to(self.dtype))

    def norm(self, channels: int) -> dict[str, Any]:
        return {
            "norm_weight": 1 + 0.2 * self.values(channels),
            "norm_bias": self.values(channels),
            "running_mean": self.values(channels),
            "running_var": self.values(channels).square() + 0.1,
            "num_batches_tracked": torch.tensor(3),
            "momentum": 0.3,
            "eps": EPS,
        }

    def statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Moments and affine (2, C)."""
        weight, bias = 1 + 0.2 * self.values(y.shape[1]), self.values(y.shape[1])
        found = maps.statistics_of(y, norm_weight=weight, norm_bias=bias, eps=EPS)
        return found[:2], found[2:]

    def coefficients(self, channels: int) -> Tensor:
        return self.values(6, channels)


def of(name: str, dtype: torch.dtype = torch.float32) -> list[Call]:
    """Calls of an op: the first has every argument that can be given at once, the last the fewest."""
    return _MAKERS[name](_Source(dtype))


def has(name: str) -> bool:
    return name in _MAKERS


def _statistics(s: _Source) -> list[Call]:
    y = s.map()
    return [Call((y,), s.norm(CHANNELS)), Call((y,))]


def _affine(s: _Source) -> list[Call]:
    moments = maps.moments_of(s.map())
    return [Call((moments, 24), s.norm(CHANNELS)), Call((moments, 0))]


def _apply(s: _Source) -> list[Call]:
    y = s.map()
    _, affine = s.statistics(y)
    return [Call((y, affine), {"activation": maps.HARDSWISH, "residual": s.map()}), Call((y, affine))]


def _coefficients(s: _Source) -> list[Call]:
    y = s.map()
    moments, affine = s.statistics(y)
    given = (s.map(), y, affine, moments)
    return [Call(given, {"activation": maps.SILU, "eps": EPS, "frozen": f}) for f in (False, True)] + [Call(given)]


def _norm_backward(s: _Source) -> list[Call]:
    y = s.map()
    given = (s.map(), y, s.statistics(y)[1], s.coefficients(CHANNELS))
    return [Call(given, {"activation": maps.RELU6}), Call(given)]


def _pointwise(s: _Source) -> list[Call]:
    x, weight = s.map(), s.values(OUTPUTS, CHANNELS, 1, 1)
    options: dict[str, Any] = {
        "affine": s.statistics(x)[1],
        "activation": maps.HARDSWISH,
        "gate": s.values(SAMPLES, CHANNELS).sigmoid(),
        "bias": s.values(OUTPUTS),
        "output_activation": maps.SILU,
        "residual": s.map(OUTPUTS),
        "want_statistics": True,
        **s.norm(OUTPUTS),
    }
    return [Call((x, weight), options), Call((x, weight), {"want_statistics": True}), Call((x, weight))]


def _pointwise_backward(s: _Source) -> list[Call]:
    x, weight, grad = s.map(), s.values(OUTPUTS, CHANNELS, 1, 1), s.map(OUTPUTS)
    moments, affine = s.statistics(x)
    before = {"affine": affine, "moments": moments, "activation": maps.HARDSWISH, "eps": EPS}
    after = {"y": s.map(OUTPUTS), "y_coefficients": s.coefficients(OUTPUTS), "residual_grad": s.map()}
    gate = s.values(SAMPLES, CHANNELS).sigmoid()
    given = (grad, x, weight)
    return [
        Call(given, {**before, **after, "gate": gate}),
        Call(given, {**before, **after}),
        Call(given, {**before, "frozen": True, "want_weight": False}),
        Call(given, {"want_x": False}),
        Call(given),
    ]


def _depthwise(s: _Source) -> list[Call]:
    x, weight = s.map(), s.values(CHANNELS, 1, 3, 3)
    options = {"affine": s.statistics(x)[1], "activation": maps.RELU6, "stride": 2, "want_statistics": True}
    options["same_padding"] = True
    return [Call((x, weight), {**options, **s.norm(CHANNELS)}), Call((x, weight))]


def _depthwise_backward(s: _Source) -> list[Call]:
    x, weight = s.map(), s.values(CHANNELS, 1, 5, 5)
    y, grad = s.map(CHANNELS, 2, 2), s.map(CHANNELS, 2, 2)
    moments, affine = s.statistics(x)
    after: dict[str, Any] = {
        "grad": grad,
        "pool_grad": s.values(SAMPLES, CHANNELS),
        "y": y,
        "y_affine": s.statistics(y)[1],
    }
    after |= {"y_coefficients": s.coefficients(CHANNELS), "y_activation": maps.HARDSWISH, "stride": 2}
    before: dict[str, Any] = {"affine": affine, "moments": moments, "activation": maps.SILU, "eps": EPS}
    return [
        Call((x, weight), {**after, **before}),
        Call((x, weight), {**after, **before, "frozen": True, "same_padding": True}),
        Call((x, weight), {**after, "residual_grad": s.map()}),
        Call((x, weight), {"grad": s.map(), "want_x": False}),
        Call((x, weight), {"grad": s.map(), "want_weight": False}),
    ]


def _gram(s: _Source) -> list[Call]:
    return [Call((s.map(),))]


def _gram_product(s: _Source) -> list[Call]:
    x, weight = s.map(), s.values(OUTPUTS, CHANNELS)
    mean, gram = expand_reference.channel_gram(x)
    return [Call((x, mean, gram, weight, weight @ gram))]


def _expand(s: _Source) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The arguments of expand_depthwise, and the moments of the expanded map."""
    x, expand_weight = s.map(), s.values(OUTPUTS, CHANNELS, 1, 1)
    y1 = torch.nn.functional.conv2d(x.to(s.wide), expand_weight)
    moments, affine = s.statistics(y1)
    return (x, expand_weight, affine, s.values(OUTPUTS, 1, 3, 3)), moments


def _expand_depthwise(s: _Source) -> list[Call]:
    given, _ = _expand(s)
    options = {"activation": maps.RELU6, "stride": 2, "want_statistics": True, **s.norm(OUTPUTS)}
    options["same_padding"] = True
    return [Call(given, options), Call(given)]


def _expand_activate(s: _Source) -> list[Call]:
    given = (*_expand(s)[0], torch.stack((1 + 0.2 * s.values(OUTPUTS), s.values(OUTPUTS))))
    options = {"activation": maps.RELU6, "stride": 2, "y_activation": maps.HARDSWISH, "want_pool": True}
    options["same_padding"] = True
    return [Call(given, options), Call(given)]


def _expand_backward(s: _Source) -> list[Call]:
    (x, expand_weight, affine, weight), moments = _expand(s)
    y = s.map(OUTPUTS)
    given = (x, x.to(s.wide).mean((0, 2, 3)), expand_weight, affine, moments, weight, y, s.statistics(y)[1])
    given = (*given, s.coefficients(OUTPUTS))
    options: dict[str, Any] = {"grad": s.map(OUTPUTS), "pool_grad": s.values(SAMPLES, OUTPUTS), "eps": EPS}
    options |= {"y_activation": maps.HARDSWISH, "activation": maps.SILU}
    return [Call(given, options), Call(given, {**options, "frozen": True}), Call(given, {"grad": s.map(OUTPUTS)})]


def _pool(s: _Source) -> list[Call]:
    x = s.map()
    options = {"affine": s.statistics(x)[1], "activation": maps.HARDSWISH, "want_variance": True}
    return [Call((x,), options), Call((x,))]


def _pool_backward(s: _Source) -> list[Call]:
    x = s.map()
    moments, affine = s.statistics(x)
    given, options = (s.values(SAMPLES, CHANNELS), x), {"affine": affine, "activation": maps.SILU}
    finish = {"moments": moments, "eps": EPS}
    return [Call(given, {**options, **finish, "frozen": f}) for f in (False, True)] + [
        Call(given, options),
        Call(given),
    ]


def _gate(s: _Source) -> list[Call]:
    given = tuple(s.values(*shape) for shape in ((SAMPLES, CHANNELS), (3, CHANNELS), (3,), (CHANNELS, 3), (CHANNELS,)))
    return [Call(given, {"activation": maps.RELU, "gate_activation": maps.HARDSIGMOID}), Call(given)]


def _gate_backward(s: _Source) -> list[Call]:
    pooled, reduce_weight, reduce_bias, expand_weight, expand_bias = (
        s.values(*shape) for shape in ((SAMPLES, CHANNELS), (3, CHANNELS), (3,), (CHANNELS, 3), (CHANNELS,))
    )
    reduced = pooled @ reduce_weight.T + reduce_bias
    expanded = reduced.relu() @ expand_weight.T + expand_bias
    given = (s.values(SAMPLES, CHANNELS), pooled, reduced, expanded, reduce_weight, expand_weight)
    options: dict[str, Any] = {"activation": maps.RELU, "gate_activation": maps.SIGMOID}
    moments, affine = s.statistics(s.map())
    finish = {"sums": s.values(4, SAMPLES, CHANNELS), "affine": affine, "moments": moments, "positions": 12, "eps": EPS}
    return [Call(given, {**options, **finish, "frozen": f}) for f in (False, True)] + [Call(given)]


def _program(s: _Source) -> list[Call]:
    """A block of every op, and a pool alone."""
    x, expand_weight, affine, weight = _expand(s)[0]
    constants = [expand_weight, affine, weight, torch.stack((1 + 0.2 * s.values(OUTPUTS), s.values(OUTPUTS)))]
    constants += [s.values(*shape) for shape in ((3, OUTPUTS), (3,), (OUTPUTS, 3), (OUTPUTS,))]
    constants += [
        s.values(CHANNELS, OUTPUTS, 1, 1),
        s.values(CHANNELS),
        s.values(CHANNELS, 1, 3, 3),
        s.values(2, CHANNELS),
    ]
    rows = [
        Instruction(Operation.EXPAND_DEPTHWISE, 1, 2, activation=maps.RELU6, output_activation=maps.HARDSWISH),
        Instruction(Operation.SQUEEZE_EXCITE, 3, input=2, constants=4, activation=1, output_activation=maps.SIGMOID),
        Instruction(Operation.RELEASE, input=2),
        Instruction(Operation.POINTWISE, 4, input=1, other=0, gate=3, constants=8, output_activation=maps.RELU),
        Instruction(Operation.DEPTHWISE, 5, input=4, constants=10, stride=2),
        Instruction(Operation.NORMALIZE, 6, input=5, constants=11, activation=maps.SILU),
    ]
    code = [int(field) for row in rows for field in row]
    pool = [int(field) for field in Instruction(Operation.POOL, 1, constants=0, on_load=1, activation=maps.RELU)]
    return [Call((x, constants, code)), Call((x, [s.values(2, CHANNELS)], pool))]


def _variance(s: _Source) -> list[Call]:
    return [Call((s.map(),)), Call((s.map().permute(0, 2, 3, 1),)), Call((s.map()[:, ::2],))]


def _loss(s: _Source) -> list[Call]:
    output = s.values(SAMPLES, 7, 3).to(s.dtype)
    target = torch.randint(7, (SAMPLES, 3), generator=s.generator)
    after = (0.3, 0.3, True, bias_loss.MEAN, -100, 0.1)
    weighted = (s.map(), None, None, output, target, s.values(7).square(), torch.tensor(0.5))
    plain = (s.map(), None, None, output[:, :, 0].contiguous(), target[:, 0].contiguous(), None, None)
    return [Call((*weighted, *after)), Call((*plain, *after))]


def _loss_backward(s: _Source) -> list[Call]:
    calls = []
    for call in _loss(s):
        features, variance, extrema, output, target, class_weight, _, *after = call.arguments
        given = (features, variance, extrema, output, target, class_weight, None, *after)
        loss, weight, statistics = bias_loss.bias_loss(*given)
        saved = (output, target, class_weight, weight, statistics, *after[3:])
        calls.append(Call((torch.full_like(loss, 0.7), *saved)))
    return calls


_MAKERS = {
    "batch_norm_statistics": _statistics,
    "batch_norm_affine": _affine,
    "batch_norm_apply": _apply,
    "batch_norm_coefficients": _coefficients,
    "batch_norm_backward": _norm_backward,
    "bias_loss": _loss,
    "bias_loss_backward": _loss_backward,
    "channel_gram": _gram,
    "channel_gram_product": _gram_product,
    "depthwise": _depthwise,
    "depthwise_backward": _depthwise_backward,
    "expand_depthwise": _expand_depthwise,
    "expand_depthwise_activate": _expand_activate,
    "expand_depthwise_backward": _expand_backward,
    "feature_variance": _variance,
    "pointwise": _pointwise,
    "pointwise_backward": _pointwise_backward,
    "pool_variance": _pool,
    "pool_variance_backward": _pool_backward,
    "program": _program,
    "squeeze_excite": _gate,
    "squeeze_excite_backward": _gate_backward,
}
