"""Triton kernels of the Bias Loss.

Forward, one launch: programs of `loss_kernel` reduce every slice of the features to its moments and every block of score rows
to its loss; the last one to arrive takes the extrema, moves the running minimum, forms the weights and reduces the loss. Only
dense scores without a reduction take a second launch, since one program alone would be slow to weigh every position. Backward,
one launch: `gradient_kernel`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from biasloss_ext.ops.bias_loss.reference import LARGEST_EXPONENT, MEAN, NONE
from biasloss_ext.ops.bias_loss.triton_rows import (
    Batch,
    CrossEntropy,
    Strided,
    before_class,
    cross_entropy,
    divided,
    exponential,
    exponential_minus_one,
    load_class,
    load_class_weight,
    load_score_of,
    load_tile,
    online_log_sum_exp,
    positions_of_block,
    rows_of,
    statistics_of_row,
    target_shares,
)
from biasloss_ext.ops.feature_variance.triton_kernels import (
    Slices,
    finish_variances,
    store_slice_moments,
    widen_extrema,
)
from biasloss_ext.ops.triton_finish import is_last

_LARGEST_EXPONENT = tl.constexpr(LARGEST_EXPONENT)
_NONE = tl.constexpr(NONE)
_MEAN = tl.constexpr(MEAN)


class Variances(NamedTuple):
    """Pointers to variances and to their extrema, or to moments that the variances follow from; the others may be None."""

    ptr: Any
    stride: Any
    extrema: Any
    moments: Any


class RowLosses(NamedTuple):
    """Pointers to the losses of rows, or of blocks of them, and to their counts in the denominator of the mean."""

    losses: Any
    counts: Any


@triton.jit
def store_row_losses(
    block,
    output,
    target,
    classes,
    batch,
    options,
    statistics_ptr,
    row_losses,
    REDUCTION: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    DENSE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Log-sum-exp and unweighted loss of a block of rows; the losses are summed where rows share a sample."""
    sample, position, inside = positions_of_block(block, batch, DENSE, ROWS)
    scores = rows_of(output, sample, position, classes, inside)
    row_max, row_log_sum = online_log_sum_exp(scores, ROWS, CLASSES, DTYPE)
    row = sample * batch.positions + position
    row_max_ptr, row_log_sum_ptr = statistics_of_row(statistics_ptr, row, batch)
    tl.store(row_max_ptr, row_max, mask=inside)
    tl.store(row_log_sum_ptr, row_log_sum, mask=inside)

    targets = rows_of(target, sample, position, classes, inside)
    loss, count = cross_entropy(
        scores, targets, options, row_max, row_log_sum, PROBABILITIES, SMOOTHED, ROWS, CLASSES, DTYPE
    )

    if DENSE and REDUCTION != _NONE:
        tl.store(row_losses.losses + block, tl.sum(tl.where(inside, loss, 0.0), 0))
        if REDUCTION == _MEAN:
            tl.store(row_losses.counts + block, tl.sum(tl.where(inside, count, 0.0), 0))
    else:
        tl.store(row_losses.losses + row, loss, mask=inside)
        if REDUCTION == _MEAN:
            tl.store(row_losses.counts + row, count, mask=inside)


@triton.jit
def bias_weight(variance, low, spread, finite, alpha, beta, DTYPE: tl.constexpr):
    """exp(alpha * v) - beta, Abrahamyan et al., "Bias Loss for Mobile Neural Networks", ICCV 2021, equations 3 and 4."""
    scaled = tl.where(spread == 0.0, 0.0, divided(variance - low, tl.where(spread == 0.0, 1.0, spread), DTYPE))
    exponent = tl.full([], alpha, DTYPE) * scaled
    exponent = tl.where(exponent > _LARGEST_EXPONENT, _LARGEST_EXPONENT, exponent)
    weight = exponential(exponent, DTYPE) - tl.full([], beta, DTYPE)
    return tl.where(finite, weight, float("nan"))


@triton.jit
def load_variances(variances, sample, in_batch, DTYPE: tl.constexpr):
    pointers = variances.ptr + sample.to(tl.int64) * variances.stride
    return tl.load(pointers, mask=in_batch, other=0.0).to(DTYPE)


@triton.jit
def reduce_variances(
    variances,
    samples,
    cut,
    SAMPLES: tl.constexpr,
    SLICES: tl.constexpr,
    FEATURE_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(-min, max) of the variances, and of those of this batch alone. The variances are given, or merged from the moments of
    the slices and stored."""
    if variances.moments is not None:
        negated_min, maximum = finish_variances(
            variances.moments, variances.ptr, samples, cut, SAMPLES, SLICES, FEATURE_DTYPE, DTYPE
        )
    else:
        negated_min = tl.full([SAMPLES], -float("inf"), DTYPE)
        maximum = tl.full([SAMPLES], -float("inf"), DTYPE)
        for start in range(0, samples, SAMPLES):
            sample = start + tl.arange(0, SAMPLES)
            in_batch = sample < samples
            variance = load_variances(variances, sample, in_batch, DTYPE)
            negated_min, maximum = widen_extrema(negated_min, maximum, variance, in_batch)
    if variances.extrema is not None:
        return tl.load(variances.extrema).to(DTYPE), tl.load(variances.extrema + 1).to(DTYPE)
    else:
        return tl.max(negated_min, 0), tl.max(maximum, 0)


@triton.jit
def finish_loss(
    variances,
    cut,
    batch,
    running_min_ptr,
    row_losses,
    loss_ptr,
    weight_ptr,
    statistics_ptr,
    alpha,
    beta,
    UPDATE_RUNNING_MIN: tl.constexpr,
    REDUCTION: tl.constexpr,
    DENSE: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLICES: tl.constexpr,
    LOSS_SAMPLES: tl.constexpr,
    LOSS_BLOCKS: tl.constexpr,
    FEATURE_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Extrema, running minimum, weights, and the loss but for dense scores without a reduction. For the last program."""
    negated_min, maximum = reduce_variances(variances, batch.samples, cut, SAMPLES, SLICES, FEATURE_DTYPE, DTYPE)
    finite = (negated_min - negated_min == 0.0) & (maximum - maximum == 0.0)
    low = -negated_min
    if running_min_ptr is not None:
        running_min = tl.load(running_min_ptr)
        low = tl.minimum(running_min.to(DTYPE), low)
    # Threads read below what others wrote above: the variances, and with it the running minimum before it moves.
    tl.debug_barrier()
    if running_min_ptr is not None and UPDATE_RUNNING_MIN:
        moved = tl.minimum(running_min, (-negated_min).to(running_min.dtype))
        tl.store(running_min_ptr, tl.where(finite, moved, running_min))

    total = tl.zeros([LOSS_SAMPLES], DTYPE)
    total_count = tl.zeros([LOSS_SAMPLES], DTYPE)
    for start in range(0, batch.samples, LOSS_SAMPLES):
        sample = start + tl.arange(0, LOSS_SAMPLES)
        in_batch = sample < batch.samples
        variance = load_variances(variances, sample, in_batch, DTYPE)
        weight = bias_weight(variance, low, maximum + negated_min, finite, alpha, beta, DTYPE)
        tl.store(weight_ptr + sample, weight, mask=in_batch)
        if REDUCTION != _NONE:
            loss = tl.zeros([LOSS_SAMPLES], DTYPE)
            for first_block in range(0, batch.blocks_per_sample, LOSS_BLOCKS):
                block = first_block + tl.arange(0, LOSS_BLOCKS)
                inside = in_batch[:, None] & (block < batch.blocks_per_sample)[None, :]
                offsets = sample.to(tl.int64)[:, None] * batch.blocks_per_sample + block[None, :]
                loss += tl.sum(tl.load(row_losses.losses + offsets, mask=inside, other=0.0, cache_modifier=".cg"), 1)
                if REDUCTION == _MEAN:
                    counts = tl.load(row_losses.counts + offsets, mask=inside, other=0.0, cache_modifier=".cg")
                    total_count += tl.sum(counts, 1)
            total += tl.where(in_batch, weight * loss, 0.0)
        elif not DENSE:
            loss = tl.load(row_losses.losses + sample, mask=in_batch, other=0.0, cache_modifier=".cg")
            tl.store(loss_ptr + sample, weight * loss, mask=in_batch)

    denominator = tl.full([], 1.0, DTYPE)
    if REDUCTION == _MEAN:
        denominator = tl.sum(total_count, 0)
    tl.store(statistics_ptr, denominator)
    if REDUCTION != _NONE:
        tl.store(loss_ptr, divided(tl.sum(total, 0), denominator, DTYPE))


@triton.jit(
    do_not_specialize=[
        "row_blocks",
        "total_slices",
        "samples",
        "positions",
        "blocks_per_sample",
        "ignore_index",
        "feature_sample_stride",
        "length",
        "slices",
        "slice_length",
        "variance_stride",
    ]
)
def loss_kernel(
    output_ptr,
    target_ptr,
    class_weight_ptr,
    features_ptr,
    variance_ptr,
    extrema_ptr,
    running_min_ptr,
    loss_ptr,
    weight_ptr,
    statistics_ptr,
    losses_ptr,
    moments_ptr,
    ticket_ptr,
    output_sample_stride,
    output_class_stride,
    output_position_stride,
    target_sample_stride,
    target_class_stride,
    target_position_stride,
    classes,
    samples,
    positions,
    row_blocks,
    blocks_per_sample,
    ignore_index,
    feature_sample_stride,
    length,
    slices,
    slice_length,
    total_slices,
    variance_stride,
    label_smoothing: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    REDUCTION: tl.constexpr,
    UPDATE_RUNNING_MIN: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    DENSE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    UNROLLED: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLICES: tl.constexpr,
    LOSS_SAMPLES: tl.constexpr,
    LOSS_BLOCKS: tl.constexpr,
    FEATURE_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Programs below ``row_blocks`` take the scores, the others a slice of the features each; the last to arrive finishes.

    Where the features are None the variances are given. The losses are followed by their counts where a mean is wanted.
    """
    program = tl.program_id(0)
    batch = Batch(samples, positions, blocks_per_sample)
    row_losses = RowLosses(losses_ptr, losses_ptr + samples.to(tl.int64) * blocks_per_sample)
    if program < row_blocks:
        store_row_losses(
            program,
            Strided(output_ptr, output_sample_stride, output_class_stride, output_position_stride),
            Strided(target_ptr, target_sample_stride, target_class_stride, target_position_stride),
            classes,
            batch,
            CrossEntropy(class_weight_ptr, ignore_index, label_smoothing),
            statistics_ptr,
            row_losses,
            REDUCTION,
            PROBABILITIES,
            SMOOTHED,
            DENSE,
            ROWS,
            CLASSES,
            DTYPE,
        )
    elif features_ptr is not None:  # noqa: SIM102 (a constant of the compiler, then a value of the device)
        if program < row_blocks + total_slices:  # a batch without samples has one program, and no slice
            store_slice_moments(
                program - row_blocks,
                features_ptr,
                moments_ptr,
                feature_sample_stride,
                Slices(length, slices, slice_length, total_slices),
                VECTOR,
                LANES,
                UNROLLED,
                FEATURE_DTYPE,
            )
    if is_last(ticket_ptr, tl.num_programs(0)):
        finish_loss(
            Variances(variance_ptr, variance_stride, extrema_ptr, moments_ptr),
            Slices(length * VECTOR, slices, slice_length * VECTOR, total_slices),
            batch,
            running_min_ptr,
            row_losses,
            loss_ptr,
            weight_ptr,
            statistics_ptr,
            alpha,
            beta,
            UPDATE_RUNNING_MIN,
            REDUCTION,
            DENSE,
            SAMPLES,
            SLICES,
            LOSS_SAMPLES,
            LOSS_BLOCKS,
            FEATURE_DTYPE,
            DTYPE,
        )


@triton.jit(do_not_specialize=["rows", "positions"])
def weigh_kernel(losses_ptr, weight_ptr, loss_ptr, rows, positions, ROWS: tl.constexpr):
    """The losses of dense scores, each times the weight of its sample."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    weight = tl.load(weight_ptr + row // positions, mask=exists, other=0.0)
    tl.store(loss_ptr + row, weight * tl.load(losses_ptr + row, mask=exists, other=0.0), mask=exists)


@triton.jit(do_not_specialize=["samples", "positions", "row_blocks", "blocks_per_sample", "ignore_index"])
def gradient_kernel(
    grad_loss_ptr,
    output_ptr,
    target_ptr,
    class_weight_ptr,
    weight_ptr,
    statistics_ptr,
    gradient_ptr,
    grad_loss_sample_stride,
    grad_loss_position_stride,
    output_sample_stride,
    output_class_stride,
    output_position_stride,
    target_sample_stride,
    target_class_stride,
    target_position_stride,
    gradient_sample_stride,
    gradient_class_stride,
    gradient_position_stride,
    classes,
    samples,
    positions,
    row_blocks,
    blocks_per_sample,
    classes_per_program,
    ignore_index,
    label_smoothing: tl.float64,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    DENSE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """grad_loss * w / denominator * (p * sum(q) - q), q the target's distribution times the class weight."""
    batch = Batch(samples, positions, blocks_per_sample)
    sample, position, inside = positions_of_block(tl.program_id(0) % row_blocks, batch, DENSE, ROWS)
    row = sample * positions + position
    output = Strided(output_ptr, output_sample_stride, output_class_stride, output_position_stride)
    scores = rows_of(output, sample, position, classes, inside)
    target = Strided(target_ptr, target_sample_stride, target_class_stride, target_position_stride)
    targets = rows_of(target, sample, position, classes, inside)
    options = CrossEntropy(class_weight_ptr, ignore_index, label_smoothing)
    gradient_row_ptr = gradient_ptr + sample * gradient_sample_stride + position * gradient_position_stride
    grad_loss_row_ptr = grad_loss_ptr + sample * grad_loss_sample_stride + position * grad_loss_position_stride

    row_max_ptr, row_log_sum_ptr = statistics_of_row(statistics_ptr, row, batch)
    row_max = tl.load(row_max_ptr, mask=inside, other=0.0)
    row_log_sum = tl.load(row_log_sum_ptr, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + sample, mask=inside, other=0.0)
    grad_loss = tl.load(grad_loss_row_ptr, mask=inside, other=0.0).to(DTYPE)
    scale = divided(grad_loss * weight, tl.zeros([ROWS], DTYPE) + tl.load(statistics_ptr), DTYPE)
    smoothing = tl.full([], label_smoothing, DTYPE)

    first_class = tl.program_id(0) // row_blocks * classes_per_program
    last_class = tl.minimum(first_class + classes_per_program, classes)
    total = tl.zeros([ROWS], DTYPE)
    if PROBABILITIES:
        for start in range(0, classes, CLASSES):
            class_index = start + tl.arange(0, CLASSES)
            total += tl.sum(target_shares(targets, options, class_index, SMOOTHED, DTYPE), 1)
    else:
        known, counted, valid = load_class(targets, ignore_index)
        weight_of_known = load_class_weight(class_weight_ptr, known, inside, DTYPE)
        scale = tl.where(valid, scale, float("nan"))
        if SMOOTHED:
            if class_weight_ptr is not None:
                weights = tl.zeros([CLASSES], DTYPE)
                for start in range(0, classes, CLASSES):
                    class_index = start + tl.arange(0, CLASSES)
                    weights += load_class_weight(class_weight_ptr, class_index, class_index < classes, DTYPE)
                mean_weight = tl.sum(weights, 0) / classes
            else:
                mean_weight = tl.full([], 1.0, DTYPE)
            total = weight_of_known * (1.0 - smoothing) + mean_weight * smoothing
        else:
            total = weight_of_known
            score = load_score_of(scores, known, DTYPE)
            # p - 1 of a confident prediction, as the small number it is
            gradient_of_known = exponential_minus_one((score - row_max) - row_log_sum, DTYPE) * total * scale

    scores, targets = before_class(scores, last_class), before_class(targets, last_class)
    for start in range(first_class, last_class, CLASSES):
        class_index = start + tl.arange(0, CLASSES)
        x, exists = load_tile(scores, class_index, DTYPE)
        probability = tl.exp((x - row_max[:, None]) - row_log_sum[:, None])
        if PROBABILITIES:
            shares = target_shares(targets, options, class_index, SMOOTHED, DTYPE)
            gradient = (probability * total[:, None] - shares) * scale[:, None]
        else:
            is_known = class_index[None, :] == known[:, None]
            if SMOOTHED:
                class_weight = load_class_weight(class_weight_ptr, class_index, class_index < classes, DTYPE)
                shares = (class_weight * (smoothing / classes))[None, :]
                shares += tl.where(is_known, (weight_of_known * (1.0 - smoothing))[:, None], 0.0)
                gradient = (probability * total[:, None] - shares) * scale[:, None]
            else:
                gradient = probability * (total * scale)[:, None]
                gradient = tl.where(is_known, gradient_of_known[:, None], gradient)
            gradient = tl.where(counted[:, None], gradient, 0.0)
        pointers = gradient_row_ptr[:, None] + class_index.to(tl.int64)[None, :] * gradient_class_stride
        tl.store(pointers, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)
