"""Triton kernels of the Bias Loss.

Forward, one launch: programs of `loss_kernel` reduce every slice of the features to its moments and every block of score rows
to its loss; the last one to arrive takes the extrema, moves the running minimum, forms the weights and reduces the loss. Only
dense scores without a reduction take a second launch, since one program alone would be slow to weigh every position. Backward,
one launch: `gradient_kernel`.

A row is the scores of one position, classes along it. A program holds ROWS x CLASSES of them at a time. Without positions
(2-d scores) its rows are samples; with positions (DENSE) they are positions of one sample, so that their losses can be summed
before the weight of the sample is known.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from biasloss_ext.ops.bias_loss.reference import LARGEST_EXPONENT, MEAN, NONE
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
_LOG2_E = tl.constexpr(1.4426950408889634)
# ln(2) as the sum of two float32, the first of so few digits that its product with a small integer is exact
_LN_2 = tl.constexpr(0.693359375)
_LN_2_REST = tl.constexpr(-2.12194440054690583e-4)
_NEAR_ZERO = tl.constexpr(-0.5)


class Strided(NamedTuple):
    """Pointer and strides of a tensor (samples, classes, positions)."""

    ptr: Any
    sample_stride: Any
    class_stride: Any
    position_stride: Any


class Rows(NamedTuple):
    """Pointers to the first class of some rows of a `Strided`, and which rows exist."""

    first_ptr: Any
    class_stride: Any
    classes: Any
    inside: Any


class Batch(NamedTuple):
    """How many positions there are, and in how many blocks of rows those of a sample are."""

    samples: Any
    positions: Any
    blocks_per_sample: Any


class CrossEntropy(NamedTuple):
    """Arguments of `torch.nn.functional.cross_entropy`; the pointer to class weights may be None."""

    class_weight: Any
    ignore_index: Any
    label_smoothing: Any


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
def divided(x, y, DTYPE: tl.constexpr):
    """x / y, rounded correctly: Triton's own operator is an approximation in float32."""
    if tl.float32 == DTYPE:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def exponential(x, DTYPE: tl.constexpr):
    """exp(x) for finite x. The fast exp of float32 loses about |x| units in the last place, and these exponents reach 60."""
    if tl.float32 == DTYPE:
        doublings = tl.floor(x * _LOG2_E + 0.5)
        return tl.exp2(doublings) * tl.exp((x - doublings * _LN_2) - doublings * _LN_2_REST)
    else:
        return tl.exp(x)


@triton.jit
def exponential_minus_one(x, DTYPE: tl.constexpr):
    """exp(x) - 1 for x <= 0, without the cancellation near 0."""
    TERMS: tl.constexpr = 9 if tl.float32 == DTYPE else 16
    series = tl.full(x.shape, 1.0, DTYPE)
    for term in tl.static_range(TERMS, 1, -1):
        series = 1.0 + series * x * (1.0 / term)
    return tl.where(x > _NEAR_ZERO, series * x, tl.exp(x) - 1.0)


@triton.jit
def logarithm_of_one_plus(x, DTYPE: tl.constexpr):
    """log(1 + x) for x >= 0: what 1 + x rounds off is a term of its own."""
    total = 1.0 + x
    return tl.log(total) + divided(x - (total - 1.0), total, DTYPE)


@triton.jit
def positions_of_block(block, batch, DENSE: tl.constexpr, ROWS: tl.constexpr):
    """(sample, position, whether they exist) of the rows of a block, in 64 bits: what they multiply may be large."""
    lanes = tl.arange(0, ROWS).to(tl.int64)
    if DENSE:
        sample = tl.zeros([ROWS], tl.int64) + block // batch.blocks_per_sample
        position = (block % batch.blocks_per_sample).to(tl.int64) * ROWS + lanes
        return sample, position, position < batch.positions
    else:
        sample = block.to(tl.int64) * ROWS + lanes
        return sample, tl.zeros([ROWS], tl.int64), sample < batch.samples


@triton.jit
def rows_of(tensor, sample, position, classes, inside):
    first_ptr = tensor.ptr + sample * tensor.sample_stride + position * tensor.position_stride
    return Rows(first_ptr, tensor.class_stride, classes, inside)


@triton.jit
def load_tile(rows, class_index, DTYPE: tl.constexpr):
    """ROWS x CLASSES of a tensor, and which of them exist; 0 elsewhere."""
    exists = rows.inside[:, None] & (class_index < rows.classes)[None, :]
    pointers = rows.first_ptr[:, None] + class_index.to(tl.int64)[None, :] * rows.class_stride
    return tl.load(pointers, mask=exists, other=0.0).to(DTYPE), exists


@triton.jit
def load_class_weight(class_weight_ptr, class_index, exists, DTYPE: tl.constexpr):
    if class_weight_ptr is not None:
        return tl.load(class_weight_ptr + class_index, mask=exists, other=0.0).to(DTYPE)
    else:
        return tl.full(class_index.shape, 1.0, DTYPE)


@triton.jit
def load_class(target, ignore_index):
    """(class, counted, valid) of a block of class targets. The class is 0 where the target names none, so that it can be
    used as an index without a look at the other two."""
    index = tl.load(target.first_ptr, mask=target.inside, other=0).to(tl.int64)
    counted = index != ignore_index
    valid = (index >= 0) & (index < target.classes)
    return tl.where(counted & valid, index, 0), counted, valid


@triton.jit
def load_score_of(scores, known, DTYPE: tl.constexpr):
    """The score of one class of each row."""
    return tl.load(scores.first_ptr + known * scores.class_stride, mask=scores.inside, other=0.0).to(DTYPE)


@triton.jit
def online_log_sum_exp(scores, ROWS: tl.constexpr, CLASSES: tl.constexpr, DTYPE: tl.constexpr):
    """(maximum, log of the sum of exp(x - maximum)) of every row, in one read of the scores.

    Each lane keeps its own maximum and the sum over its other scores, so that there is one exponential per score and no
    exchange between lanes until the end. The ones of the maxima stay out of the sums, where they would swallow the small
    terms: where one score is far above the others, those terms are all of the loss. NaN and +infinity make the sum NaN,
    -infinity adds nothing, a row of -infinity alone has maximum and log_sum -infinity: the losses are then what torch's
    log_softmax makes of such rows.
    """
    infinity = float("inf")
    maximum = tl.full([ROWS, CLASSES], -infinity, DTYPE)
    rest = tl.zeros([ROWS, CLASSES], DTYPE)
    for start in range(0, scores.classes, CLASSES):
        x, exists = load_tile(scores, start + tl.arange(0, CLASSES), DTYPE)
        x = tl.where(exists, x, -infinity)
        # One of exp(x - maximum) and exp(maximum - x) is needed; both -infinity would make it NaN.
        smaller = tl.where(x == -infinity, 0.0, tl.exp(-tl.abs(x - maximum)))
        rest = tl.where(x > maximum, rest * smaller + smaller, rest + smaller)
        maximum = tl.where(x > maximum, x, maximum)
    row_max = tl.max(maximum, 1)
    is_largest = maximum == row_max[:, None]
    rest = tl.where(is_largest, rest, (rest + 1.0) * tl.exp(maximum - row_max[:, None]))
    row_rest = tl.sum(rest, 1) + (tl.sum(is_largest.to(DTYPE), 1) - 1.0)
    log_sum = tl.where(row_max == infinity, float("nan"), logarithm_of_one_plus(row_rest, DTYPE))
    return row_max, tl.where(row_max == -infinity, -infinity, log_sum)


@triton.jit
def class_losses(
    scores,
    target,
    options,
    row_max,
    row_log_sum,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(loss, count) of rows with class targets; log p = (x - max) - log_sum is more exact than x - log_sum_exp."""
    known, counted, valid = load_class(target, options.ignore_index)
    count = load_class_weight(options.class_weight, known, scores.inside, DTYPE)
    loss = (row_log_sum - (load_score_of(scores, known, DTYPE) - row_max)) * count
    if SMOOTHED:
        smoothing = tl.full([], options.label_smoothing, DTYPE)
        spread = tl.zeros([ROWS], DTYPE)
        for start in range(0, scores.classes, CLASSES):
            class_index = start + tl.arange(0, CLASSES)
            x, exists = load_tile(scores, class_index, DTYPE)
            class_weight = load_class_weight(options.class_weight, class_index, class_index < scores.classes, DTYPE)
            terms = class_weight[None, :] * (row_log_sum[:, None] - (x - row_max[:, None]))
            spread += tl.sum(tl.where(exists, terms, 0.0), 1)
        loss = loss * (1.0 - smoothing) + spread * (smoothing / scores.classes)
    loss = tl.where(valid, loss, float("nan"))
    return tl.where(counted, loss, 0.0), tl.where(counted, count, 0.0)


@triton.jit
def target_shares(target, options, class_index, SMOOTHED: tl.constexpr, DTYPE: tl.constexpr):
    """Probability targets, smoothed and times the class weight; 0 outside."""
    probability, exists = load_tile(target, class_index, DTYPE)
    if SMOOTHED:
        smoothing = tl.full([], options.label_smoothing, DTYPE)
        probability = probability * (1.0 - smoothing) + smoothing / target.classes
    class_weight = load_class_weight(options.class_weight, class_index, class_index < target.classes, DTYPE)
    return tl.where(exists, probability * class_weight[None, :], 0.0)


@triton.jit
def probability_losses(
    scores,
    target,
    options,
    row_max,
    row_log_sum,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(loss, count) of rows with probability targets."""
    loss = tl.zeros([ROWS], DTYPE)
    for start in range(0, scores.classes, CLASSES):
        class_index = start + tl.arange(0, CLASSES)
        x, exists = load_tile(scores, class_index, DTYPE)
        shares = target_shares(target, options, class_index, SMOOTHED, DTYPE)
        terms = shares * (row_log_sum[:, None] - (x - row_max[:, None]))
        loss += tl.sum(tl.where(exists, terms, 0.0), 1)
    return loss, tl.full([ROWS], 1.0, DTYPE)


@triton.jit
def statistics_of_row(statistics_ptr, row, batch):
    """Where the maximum and the log-sum of a row are: the denominator, then all maxima, then all log-sums."""
    row_max_ptr = statistics_ptr + 1 + row
    return row_max_ptr, row_max_ptr + batch.samples.to(tl.int64) * batch.positions


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
    if PROBABILITIES:
        loss, count = probability_losses(scores, targets, options, row_max, row_log_sum, SMOOTHED, ROWS, CLASSES, DTYPE)
    else:
        loss, count = class_losses(scores, targets, options, row_max, row_log_sum, SMOOTHED, ROWS, CLASSES, DTYPE)

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

    scores = rows_of(output, sample, position, last_class, inside)
    targets = rows_of(target, sample, position, last_class, inside)
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
