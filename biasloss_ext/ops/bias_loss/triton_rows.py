"""Rows of scores in the Triton kernels of the Bias Loss: how they are loaded, their log-sum-exp, their cross-entropy.

A row is the scores of one position, classes along it. A program holds ROWS x CLASSES of them at a time. Without positions
(2-d scores) its rows are samples; with positions (DENSE) they are positions of one sample, so that their losses can be summed
before the weight of the sample is known.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
    """log(1 + x) for x >= 0: adds what 1 + x rounds off as a term of its own."""
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
def before_class(rows, classes):
    """The first classes of rows."""
    return Rows(rows.first_ptr, rows.class_stride, classes, rows.inside)


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
def target_shares(target, options, class_index, SMOOTHED: tl.constexpr, DTYPE: tl.constexpr):
    """Probability targets, smoothed and times the class weight; 0 outside."""
    probability, exists = load_tile(target, class_index, DTYPE)
    if SMOOTHED:
        smoothing = tl.full([], options.label_smoothing, DTYPE)
        probability = probability * (1.0 - smoothing) + smoothing / target.classes
    class_weight = load_class_weight(options.class_weight, class_index, class_index < target.classes, DTYPE)
    return tl.where(exists, probability * class_weight[None, :], 0.0)


@triton.jit
def cross_entropy(
    scores,
    target,
    options,
    row_max,
    row_log_sum,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(loss, count in the denominator of the mean) of rows; log p = (x - max) - log_sum is more exact than
    x - log_sum_exp."""
    spread = tl.zeros([ROWS], DTYPE)  # over all classes
    if PROBABILITIES or SMOOTHED:
        for start in range(0, scores.classes, CLASSES):
            class_index = start + tl.arange(0, CLASSES)
            x, exists = load_tile(scores, class_index, DTYPE)
            if PROBABILITIES:
                shares = target_shares(target, options, class_index, SMOOTHED, DTYPE)
            else:
                exists_in_row = class_index < scores.classes
                shares = load_class_weight(options.class_weight, class_index, exists_in_row, DTYPE)[None, :]
            terms = shares * (row_log_sum[:, None] - (x - row_max[:, None]))
            spread += tl.sum(tl.where(exists, terms, 0.0), 1)
    if PROBABILITIES:
        return spread, tl.full([ROWS], 1.0, DTYPE)
    else:
        known, counted, valid = load_class(target, options.ignore_index)
        count = load_class_weight(options.class_weight, known, scores.inside, DTYPE)
        loss = (row_log_sum - (load_score_of(scores, known, DTYPE) - row_max)) * count
        if SMOOTHED:
            smoothing = tl.full([], options.label_smoothing, DTYPE)
            loss = loss * (1.0 - smoothing) + spread * (smoothing / scores.classes)
        loss = tl.where(valid, loss, float("nan"))
        return tl.where(counted, loss, 0.0), tl.where(counted, count, 0.0)


@triton.jit
def statistics_of_row(statistics_ptr, row, batch):
    """Where the maximum and the log-sum of a row are: the denominator, then all maxima, then all log-sums."""
    row_max_ptr = statistics_ptr + 1 + row
    return row_max_ptr, row_max_ptr + batch.samples.to(tl.int64) * batch.positions
