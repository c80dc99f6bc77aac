"""Bias Loss and compact CNNs for PyTorch, at memory speed."""

from biasloss_ext import functional
from biasloss_ext.acceleration import accelerate
from biasloss_ext.checks import check_targets
from biasloss_ext.features import FeatureTap
from biasloss_ext.functional import bias_weight, feature_variance
from biasloss_ext.inference import optimize_for_inference
from biasloss_ext.loss import FusedBiasLoss
from biasloss_ext.nn.quantization.quantize import quantization_report
from biasloss_ext.ops.native import warn_if_missing
from biasloss_ext.version import __version__

warn_if_missing()

__all__ = [
    "FeatureTap",
    "FusedBiasLoss",
    "__version__",
    "accelerate",
    "bias_weight",
    "check_targets",
    "feature_variance",
    "functional",
    "optimize_for_inference",
    "quantization_report",
]
