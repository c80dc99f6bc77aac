"""``biasloss_ext::bias_loss_triton`` and its backward: the launches.

One forward (and one more for dense scores with ``reduction="none"``), one backward. No wait of the host, no allocation beyond
the outputs and a few partial sums: capturable in a CUDA graph once a first call has compiled the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops.bias_loss import triton_kernels as kernels
from biasloss_ext.ops.bias_loss.op import Outputs
from biasloss_ext.ops.bias_loss.reference import MEAN, NONE, Arguments, BackwardArguments
from biasloss_ext.ops.feature_variance.triton import UNROLLED, WARPS, layout_of, merge_tile, slicing, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype, with_arguments_of
from biasloss_ext.ops.triton_launch import Launch, divide_up, next_power_of_two, tickets

TILE = 1024  # scores that a program holds, in two states of 4 bytes each
WIDE_TILE = 2048  # for rows that are longer than that
TILE_OF_SHORT_ROWS = 512  # several of them: each has a target and a loss beside its scores to keep in registers
MOST_ROWS = 64
BLOCKS_OF_GRADIENT = (
    4  # tiles along the classes that a program of the backward pass takes, where programs need no sum of all
)
LOSS_TILE = 512  # samples x blocks of rows that one step of the last reduction holds
WEIGHED_ROWS = 1024  # that a program weighs


def score_tile(output: Tensor) -> dict[str, int]:
    """ROWS and CLASSES of a tile, along memory where the strides allow. The batch size plays no part in it, so that a smaller
    last batch needs no other kernel."""
    classes = next_power_of_two(output.shape[1])
    dense = output.dim() > 2
    most_rows = min(next_power_of_two(max(output.shape[2], 1)), MOST_ROWS) if dense else MOST_ROWS
    row_stride = output.stride(2) if dense else output.stride(0)
    if row_stride < output.stride(1):
        return {"ROWS": most_rows, "CLASSES": min(classes, TILE // most_rows)}
    narrow = output.dtype == torch.float64 or classes <= TILE
    width = min(classes, TILE if narrow else WIDE_TILE)
    return {"ROWS": min(most_rows, max(TILE_OF_SHORT_ROWS // width, 1)), "CLASSES": width}


def strides(t: Tensor, has_classes: bool) -> tuple[int, int, int]:
    """(sample, class, position) strides; 0 for what a tensor lacks."""
    sample = t.stride(0) if t.dim() > 0 else 0
    if has_classes:
        return sample, t.stride(1), t.stride(2) if t.dim() > 2 else 0
    return sample, 0, t.stride(1) if t.dim() > 1 else 0


class Rows(NamedTuple):
    """How the rows of scores are divided among programs."""

    tile: dict[str, int]
    samples: int
    positions: int
    blocks_per_sample: int  # 1 where blocks span samples
    blocks: int


def rows_of(output: Tensor) -> Rows:
    tile, samples = score_tile(output), output.shape[0]
    if output.dim() == 2:
        return Rows(tile, samples, 1, 1, divide_up(samples, tile["ROWS"]))
    blocks = divide_up(output.shape[2], tile["ROWS"])
    return Rows(tile, samples, output.shape[2], blocks, samples * blocks)


def _in_order(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _layout(t: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan's key holds of a tensor that is read by its strides."""
    return None if t is None else (t.shape, t.stride(), t.dtype)


class Plan(NamedTuple):
    """The launches for tensors of some layouts, and what is to be allocated for them."""

    loss: Launch
    weigh: Launch | None
    in_place: bool  # the features are read as they are; else a contiguous copy is
    wide: torch.dtype
    loss_shape: tuple[int, ...]
    statistics: int
    losses: int
    moments: int


_plans: dict[tuple[Any, ...], Plan] = {}
_backward_plans: dict[tuple[Any, ...], Launch] = {}


@with_arguments_of(Arguments)
def bias_loss(call: Arguments) -> Outputs:
    outputs: Outputs = _on_device_of(call.output, _bias_loss, call)
    return outputs


@with_arguments_of(BackwardArguments)
def bias_loss_backward(call: BackwardArguments) -> Tensor:
    gradient: Tensor = _on_device_of(call.output, _bias_loss_backward, call)
    return gradient


def _on_device_of(output: Tensor, function: Callable[..., Any], call: Any) -> Any:
    device = output.device
    if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
        with torch.cuda.device_of(output):
            return function(call)
    return function(call)


def _bias_loss(call: Arguments) -> Outputs:
    features, variance, extrema, output, target, class_weight, running_min, *options = call
    device = output.device
    if variance is not None:
        features = None
    key = (
        device,
        None if features is None else layout_of(features),
        _layout(variance),
        _layout(output),
        _layout(target),
        *[None if t is None else t.dtype for t in (extrema, class_weight, running_min)],
        *options,
    )
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(call._replace(features=features))
    wide = plan.wide
    loss = torch.empty(plan.loss_shape, dtype=wide, device=device)
    weight = torch.empty(output.shape[0], dtype=wide, device=device)
    statistics = torch.empty(plan.statistics, dtype=wide, device=device)
    losses = torch.empty(plan.losses, dtype=wide, device=device)
    moments = None
    if features is not None:
        features = features if plan.in_place else features.contiguous()
        moments = torch.empty(plan.moments, dtype=accumulation_dtype(features.dtype), device=device)
        variance = torch.empty(output.shape[0], dtype=wide, device=device)
    plan.loss(
        output,
        target,
        _in_order(class_weight),
        features,
        variance,
        _in_order(extrema),
        running_min,
        loss,
        weight,
        statistics,
        losses,
        moments,
        tickets(output, 1),
    )
    if plan.weigh is not None:
        plan.weigh(losses, weight, loss)
    return loss, weight, statistics


class _FeatureSide(NamedTuple):
    """What the launch takes of the features, or of given variances: the compiler drops what only features are used for."""

    numbers: tuple[int, ...] = (1, 1, 1, 1, 0, 1)
    vector: int = 1
    lanes: int = 1
    unrolled: int = 1
    in_place: bool = True

    @property
    def slices(self) -> int:
        return self.numbers[2]

    @property
    def total_slices(self) -> int:
        return self.numbers[4]


def _feature_side(features: Tensor | None, variance: Tensor | None) -> _FeatureSide:
    if features is None:
        assert variance is not None
        return _FeatureSide((1, 1, 1, 1, 0, variance.stride(0)))
    cut = slicing(features)
    numbers = (
        cut.sample_stride // cut.vector,
        cut.length // cut.vector,
        cut.slices,
        cut.slice_length // cut.vector,
        cut.samples * cut.slices,
        1,
    )
    return _FeatureSide(numbers, cut.vector, cut.lanes, UNROLLED, cut.features is features)


def _plan(call: Arguments) -> Plan:
    output, target, reduction = call.output, call.target, call.reduction
    wide, rows, side = accumulation_dtype(output.dtype), rows_of(output), _feature_side(call.features, call.variance)
    dense, probabilities = output.dim() > 2, target.is_floating_point()
    loss_blocks = 1 if rows.blocks_per_sample == 1 else 64
    launch = Launch(
        kernels.loss_kernel,
        max(rows.blocks + side.total_slices, 1),
        (
            *strides(output, has_classes=True),
            *strides(target, has_classes=probabilities),
            output.shape[1],
            rows.samples,
            rows.positions,
            rows.blocks,
            rows.blocks_per_sample,
            call.ignore_index,
            *side.numbers,
            call.label_smoothing,
            call.alpha,
            call.beta,
        ),
        {
            "REDUCTION": reduction,
            "UPDATE_RUNNING_MIN": call.update_running_min,
            "PROBABILITIES": probabilities,
            "SMOOTHED": call.label_smoothing != 0.0,
            "DENSE": dense,
            **rows.tile,
            "VECTOR": side.vector,
            "LANES": side.lanes,
            "UNROLLED": side.unrolled,
            **merge_tile(side.slices),
            "LOSS_SAMPLES": LOSS_TILE // loss_blocks,
            "LOSS_BLOCKS": loss_blocks,
            "FEATURE_DTYPE": triton_dtype(wide if call.features is None else call.features.dtype),
            "DTYPE": triton_dtype(wide),
            "num_warps": WARPS,
        },
    )
    all_rows = rows.samples * rows.positions
    weigh = None
    if reduction == NONE and dense and all_rows > 0:
        numbers = (all_rows, rows.positions)
        weigh = Launch(
            kernels.weigh_kernel, divide_up(all_rows, WEIGHED_ROWS), numbers, {"ROWS": WEIGHED_ROWS, "num_warps": WARPS}
        )
    # Rows of a sample are summed within a block; without a reduction the losses are kept.
    losses = all_rows if reduction == NONE else (2 if reduction == MEAN else 1) * rows.samples * rows.blocks_per_sample
    loss_shape = (rows.samples, *output.shape[2:]) if reduction == NONE else ()
    return Plan(launch, weigh, side.in_place, wide, tuple(loss_shape), 1 + 2 * all_rows, losses, 3 * side.total_slices)


def _bias_loss_backward(call: BackwardArguments) -> Tensor:
    """``reduction`` is not looked at: the denominator and the shape of ``grad_loss`` hold what is needed of it."""
    grad_loss, output, target, class_weight, weight, statistics, _, *options = call
    gradient = torch.empty_like(output)
    if gradient.numel() == 0:
        return gradient
    tensors = tuple([_layout(t) for t in (grad_loss, output, target, gradient)])
    dtypes = None if class_weight is None else class_weight.dtype, weight.dtype
    key = (output.device, tensors, dtypes, *options)
    launch = _backward_plans.get(key)
    if launch is None:
        launch = _backward_plans[key] = _backward_launch(call, gradient)
    launch(grad_loss, output, target, _in_order(class_weight), weight, statistics, gradient)
    return gradient


def _backward_launch(call: BackwardArguments, gradient: Tensor) -> Launch:
    output, target = call.output, call.target
    rows, classes = rows_of(output), output.shape[1]
    probabilities, smoothed = target.is_floating_point(), call.label_smoothing != 0.0
    # A sum over all classes is needed first, and the second read of the row then comes from a cache.
    whole_rows = probabilities or (smoothed and call.class_weight is not None)
    classes_per_program = classes if whole_rows else rows.tile["CLASSES"] * BLOCKS_OF_GRADIENT
    grad_sample_stride, _, grad_position_stride = strides(call.grad_loss, has_classes=False)
    return Launch(
        kernels.gradient_kernel,
        rows.blocks * divide_up(classes, classes_per_program),
        (
            grad_sample_stride,
            grad_position_stride,
            *strides(output, has_classes=True),
            *strides(target, has_classes=probabilities),
            *strides(gradient, has_classes=True),
            classes,
            rows.samples,
            rows.positions,
            rows.blocks,
            rows.blocks_per_sample,
            classes_per_program,
            call.ignore_index,
            call.label_smoothing,
        ),
        {
            "PROBABILITIES": probabilities,
            "SMOOTHED": smoothed,
            "DENSE": output.dim() > 2,
            **rows.tile,
            "DTYPE": triton_dtype(output.dtype),
            "num_warps": WARPS,
        },
    )
