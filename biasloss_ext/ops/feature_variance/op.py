"""``biasloss_ext::feature_variance``: schema and shape function, for the compiled kernels and for their Triton twin."""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.ops.library import accumulation_dtype, define

SIGNATURE = "(Tensor features) -> (Tensor variance, Tensor extrema)"


def _fake(features: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(features.dtype)
    return features.new_empty(features.shape[0], dtype=dtype), features.new_empty(2, dtype=dtype)


native = define("feature_variance", SIGNATURE, _fake)
triton = define("feature_variance_triton", SIGNATURE, _fake)
