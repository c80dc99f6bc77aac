"""What the ops expect: the shape of every tensor argument, in sizes that the arguments of a call share.

A shape is a string of sizes: N samples, C channels, K output channels or classes, E expanded channels, R reduced channels,
H and W positions, h and w positions of the output, k the kernel, S positions of scores, L the length of statistics. Numbers
stand for themselves. "map" in front makes the tensor channels_last.
"""

from __future__ import annotations

_X = "map N C H W"
_NORM = {"norm_weight": "{0}", "norm_bias": "{0}", "running_mean": "{0}", "running_var": "{0}"}
_SCORES = {
    "features": "N C H W",
    "variance": "N",
    "extrema": "2",
    "output": "N K S",
    "target": "N S",
    "class_weight": "K",
    "running_min": "",
    "grad_loss": "N S",
    "weight": "N",
    "statistics": "L",
}


def _norm(channels: str) -> dict[str, str]:
    return {"num_batches_tracked": "", **{name: shape.format(channels) for name, shape in _NORM.items()}}


SHAPES: dict[str, dict[str, str]] = {
    "pointwise": {
        "x": _X, "weight": "K C 1 1", "affine": "2 C", "gate": "N C", "bias": "K", "residual": "map N K H W", **_norm("K"),
    },
    "pointwise_backward": {
        "grad": "map N K H W", "x": _X, "weight": "K C 1 1", "y": "map N K H W", "y_coefficients": "6 K", "affine": "2 C",
        "moments": "2 C", "gate": "N C", "residual_grad": _X,
    },
    "depthwise": {"x": _X, "weight": "C 1 k k", "affine": "2 C", **_norm("C")},
    "depthwise_backward": {
        "x": _X, "weight": "C 1 k k", "grad": "map N C h w", "pool_grad": "N C", "y": "map N C h w", "y_affine": "2 C",
        "y_coefficients": "6 C", "affine": "2 C", "moments": "2 C", "residual_grad": _X,
    },
    "expand_depthwise": {"x": _X, "expand_weight": "E C 1 1", "affine": "2 E", "weight": "E 1 k k", **_norm("E")},
    "expand_depthwise_activate": {
        "x": _X, "expand_weight": "E C 1 1", "affine": "2 E", "weight": "E 1 k k", "y_affine": "2 E",
    },
    "expand_depthwise_backward": {
        "x": _X, "x_mean": "C", "expand_weight": "E C 1 1", "affine": "2 E", "moments": "2 E", "weight": "E 1 k k",
        "y": "map N E h w", "y_affine": "2 E", "y_coefficients": "6 E", "grad": "map N E h w", "pool_grad": "N E",
    },
    "channel_gram": {"x": _X},
    "channel_gram_product": {"x": _X, "mean": "C", "gram": "C C", "weight": "K C", "weight_gram": "K C"},
    "batch_norm_statistics": {"y": _X, **_norm("C")},
    "batch_norm_affine": {"moments": "2 C", **_norm("C")},
    "batch_norm_apply": {"y": _X, "affine": "2 C", "residual": _X},
    "batch_norm_coefficients": {"grad": _X, "y": _X, "affine": "2 C", "moments": "2 C"},
    "batch_norm_backward": {"grad": _X, "y": _X, "affine": "2 C", "coefficients": "6 C"},
    "pool_variance": {"x": _X, "affine": "2 C"},
    "pool_variance_backward": {"pool_grad": "N C", "x": _X, "affine": "2 C", "moments": "2 C"},
    "squeeze_excite": {
        "pooled": "N C", "reduce_weight": "R C", "reduce_bias": "R", "expand_weight": "C R", "expand_bias": "C",
    },
    "squeeze_excite_backward": {
        "gate_grad": "N C", "pooled": "N C", "reduced": "N R", "expanded": "N C", "reduce_weight": "R C",
        "expand_weight": "C R", "sums": "4 N C", "affine": "2 C", "moments": "2 C",
    },
    "feature_variance": {"features": "N C H W"},
    "bias_loss": _SCORES,
    "bias_loss_backward": _SCORES,
}  # fmt: skip

# Tensors whose values are stored in the dtype of the maps; all others are in the dtype that sums are kept in.
STORED = {"x", "y", "grad", "residual", "residual_grad", "features", "output"}
INTEGERS = {"target", "num_batches_tracked"}
