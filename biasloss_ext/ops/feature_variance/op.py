"""``biasloss_ext::feature_variance``: declaration.

feature_variance: the unbiased variance (N,) of each sample of features (N, *), and extrema (2,), the negated minimum and the
    maximum of it over the batch, both in the accumulation dtype. Deterministic.
"""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.ops.feature_variance import reference
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.registry import declare


@declare(
    reference.feature_variance,
    "(Tensor features) -> (Tensor variance, Tensor extrema)",
    native=("cpu", "cuda"),
    triton=True,
)
def feature_variance(features: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(features.dtype)
    return features.new_empty(features.shape[0], dtype=dtype), features.new_empty(2, dtype=dtype)
