"""``biasloss_ext::bias_loss_triton`` and its backward: the launches.

Two forward (and one more for ``reduction="none"``), one backward. No wait of the host, no allocation beyond the outputs and a
few partial sums, no state: capturable in a CUDA graph once a first call has compiled the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from biasloss_ext.ops.bias_loss import triton_kernels as kernels
from biasloss_ext.ops.bias_loss.op import Outputs
from biasloss_ext.ops.bias_loss.reference import MEAN, NONE
from biasloss_ext.ops.feature_variance.triton import UNROLLED, WARPS, merge_tile, slicing, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype

TILE = 1024  # scores that a program holds, in two states of 4 bytes each
WIDE_TILE = 2048  # for rows that are longer than that
TILE_OF_SHORT_ROWS = 512  # several of them: each has a target and a loss beside its scores to keep in registers
MOST_ROWS = 64
BLOCKS_OF_GRADIENT = (
    4  # tiles along the classes that a program of the backward pass takes, where programs need no sum of all
)
LOSS_TILE = 1024  # samples x blocks of rows that one step of the last reduction holds


def score_tile(output: Tensor) -> dict[str, int]:
    """ROWS and CLASSES of a tile, along memory where the strides allow. The batch size plays no part in it, so that a smaller
    last batch needs no other kernel."""
    classes = triton.next_power_of_2(output.shape[1])
    dense = output.dim() > 2
    most_rows = min(triton.next_power_of_2(max(output.shape[2], 1)), MOST_ROWS) if dense else MOST_ROWS
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


def _row_arguments(output: Tensor, rows_per_tile: int) -> tuple[int, int, int]:
    """(samples, positions, blocks of rows per sample); the last is 1 where blocks span samples."""
    if output.dim() == 2:
        return output.shape[0], 1, 1
    return output.shape[0], output.shape[2], triton.cdiv(output.shape[2], rows_per_tile)


def _row_blocks(output: Tensor, rows_per_tile: int, blocks_per_sample: int) -> int:
    samples = output.shape[0]
    return samples * blocks_per_sample if output.dim() > 2 else int(triton.cdiv(samples, rows_per_tile))


def _in_order(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def bias_loss(
    features: Tensor | None,
    variance: Tensor | None,
    extrema: Tensor | None,
    output: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    running_min: Tensor | None,
    alpha: float,
    beta: float,
    update_running_min: bool,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Outputs:
    dtype = accumulation_dtype(output.dtype)
    tile = score_tile(output)
    samples, positions, blocks_per_sample = _row_arguments(output, tile["ROWS"])
    row_blocks = _row_blocks(output, tile["ROWS"], blocks_per_sample)
    class_weight, extrema = _in_order(class_weight), _in_order(extrema)

    def empty(*shape: int) -> Tensor:
        return output.new_empty(shape, dtype=dtype)

    rows = samples * positions
    weight, statistics = empty(samples), empty(1 + 2 * rows)
    # Rows of a sample are summed within a block; without a reduction the losses are kept, unweighted at first.
    loss = empty() if reduction != NONE else empty(samples, *output.shape[2:])
    losses = loss if reduction == NONE else empty(samples * blocks_per_sample)
    counts = empty(samples * blocks_per_sample) if reduction == MEAN else None

    moments = None
    # The arguments of the feature side where there is none: the compiler drops what they would be used for.
    feature_arguments: tuple[Any, ...] = (None, None, 1, 1, 1, 1, 0)
    feature_meta: dict[str, Any] = {"VECTOR": 1, "LANES": 1, "UNROLLED": 1, "FEATURE_DTYPE": triton_dtype(dtype)}
    slices, slice_length, length, total_slices = 1, 1, 1, 0
    if variance is None:
        assert features is not None
        cut = slicing(features)
        slices, slice_length, length, total_slices = cut.slices, cut.slice_length, cut.length, samples * cut.slices
        moments = features.new_empty(3 * total_slices, dtype=accumulation_dtype(features.dtype))
        feature_arguments = (
            cut.features,
            moments,
            cut.sample_stride // cut.vector,
            length // cut.vector,
            slices,
            slice_length // cut.vector,
            total_slices,
        )
        feature_meta = {
            "VECTOR": cut.vector,
            "LANES": cut.lanes,
            "UNROLLED": UNROLLED,
            "FEATURE_DTYPE": triton_dtype(features.dtype),
        }

    with torch.cuda.device_of(output):
        if row_blocks + total_slices > 0:
            kernels.partials_kernel[(row_blocks + total_slices,)](
                row_blocks,
                output,
                *strides(output, has_classes=True),
                target,
                *strides(target, has_classes=target.is_floating_point()),
                class_weight,
                statistics,
                losses,
                counts,
                samples,
                output.shape[1],
                positions,
                blocks_per_sample,
                ignore_index,
                label_smoothing,
                *feature_arguments,
                REDUCTION=reduction,
                PROBABILITIES=target.is_floating_point(),
                SMOOTHED=label_smoothing != 0.0,
                DENSE=output.dim() > 2,
                **tile,
                DTYPE=triton_dtype(dtype),
                **feature_meta,
                num_warps=WARPS,
            )
        loss_blocks = 1 if blocks_per_sample == 1 else 64
        kernels.finish_kernel[(1,)](
            moments,
            variance,
            0 if variance is None else variance.stride(0),
            extrema,
            running_min,
            losses,
            counts,
            loss,
            weight,
            statistics,
            samples,
            length,
            slices,
            slice_length,
            total_slices,
            blocks_per_sample,
            alpha,
            beta,
            UPDATE_RUNNING_MIN=update_running_min,
            REDUCTION=reduction,
            **merge_tile(slices),
            LOSS_SAMPLES=LOSS_TILE // loss_blocks,
            LOSS_BLOCKS=loss_blocks,
            FEATURE_DTYPE=feature_meta["FEATURE_DTYPE"],
            DTYPE=triton_dtype(dtype),
            num_warps=2 * WARPS,
        )
        if reduction == NONE:
            loss.mul_(weight if loss.dim() == 1 else weight[:, None])
    return loss, weight, statistics


def bias_loss_backward(
    grad_loss: Tensor,
    output: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """``reduction`` is not looked at: the denominator and the shape of ``grad_loss`` hold what is needed of it."""
    gradient = torch.empty_like(output)
    tile = score_tile(output)
    samples, positions, blocks_per_sample = _row_arguments(output, tile["ROWS"])
    row_blocks = _row_blocks(output, tile["ROWS"], blocks_per_sample)
    classes = output.shape[1]
    probabilities = target.is_floating_point()
    # A sum over all classes is needed first, and the second read of the row then comes from a cache.
    whole_rows = probabilities or (label_smoothing != 0.0 and class_weight is not None)
    classes_per_program = classes if whole_rows else tile["CLASSES"] * BLOCKS_OF_GRADIENT
    grad_sample_stride, _, grad_position_stride = strides(grad_loss, has_classes=False)
    if row_blocks == 0:
        return gradient
    with torch.cuda.device_of(output):
        kernels.gradient_kernel[(row_blocks, triton.cdiv(classes, classes_per_program))](
            grad_loss,
            grad_sample_stride,
            grad_position_stride,
            output,
            *strides(output, has_classes=True),
            target,
            *strides(target, has_classes=probabilities),
            _in_order(class_weight),
            weight,
            statistics,
            gradient,
            *strides(gradient, has_classes=True),
            samples,
            classes,
            positions,
            blocks_per_sample,
            classes_per_program,
            ignore_index,
            label_smoothing,
            PROBABILITIES=probabilities,
            SMOOTHED=label_smoothing != 0.0,
            DENSE=output.dim() > 2,
            **tile,
            DTYPE=triton_dtype(output.dtype),
            num_warps=WARPS,
        )
    return gradient
