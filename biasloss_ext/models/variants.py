"""The four published sizes of SkipblockNet, each with its builder."""

from __future__ import annotations

from typing import NamedTuple

from biasloss_ext.models.registry import register
from biasloss_ext.models.skipblocknet import ReturnFeatures, SkipblockNet
from biasloss_ext.nn.fused_chain import Fused


class Variant(NamedTuple):
    """A published size. The paper prints only totals; these widths give its parameter counts.

    Source of the paper's figures: Bias Loss for Mobile Neural Networks (ICCV 2021, arXiv 2107.11170), ImageNet.
    """

    width: float
    classifier_width: int
    paper_top1: float
    paper_million_parameters: float
    paper_million_multiply_adds: int


VARIANTS = {
    "skipblocknet_xs": Variant(0.5, 1024, 69.9, 2.3, 80),
    "skipblocknet_s": Variant(0.75, 1024, 73.8, 3.6, 150),
    "skipblocknet_m": Variant(1.0, 1280, 76.2, 5.5, 246),
    "skipblocknet_l": Variant(1.2, 1280, 77.1, 7.1, 365),
}


def _build(
    name: str,
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    small_input: bool,
    return_features: ReturnFeatures,
    fused: Fused,
) -> SkipblockNet:
    variant = VARIANTS[name]
    return SkipblockNet(
        num_classes,
        in_chans,
        drop_rate,
        small_input,
        width=variant.width,
        classifier_width=variant.classifier_width,
        return_features=return_features,
        fused=fused,
    )


@register
def skipblocknet_xs(
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.2,
    small_input: bool = False,
    return_features: ReturnFeatures = "none",
    fused: Fused = "auto",
) -> SkipblockNet:
    """SkipblockNet-XS, 2.3 million parameters. The arguments are those of `SkipblockNet`."""
    return _build("skipblocknet_xs", num_classes, in_chans, drop_rate, small_input, return_features, fused)


@register
def skipblocknet_s(
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.2,
    small_input: bool = False,
    return_features: ReturnFeatures = "none",
    fused: Fused = "auto",
) -> SkipblockNet:
    """SkipblockNet-S, 3.6 million parameters. The arguments are those of `SkipblockNet`."""
    return _build("skipblocknet_s", num_classes, in_chans, drop_rate, small_input, return_features, fused)


@register
def skipblocknet_m(
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.2,
    small_input: bool = False,
    return_features: ReturnFeatures = "none",
    fused: Fused = "auto",
) -> SkipblockNet:
    """SkipblockNet-M, 5.5 million parameters. The arguments are those of `SkipblockNet`. It loads the published weights."""
    return _build("skipblocknet_m", num_classes, in_chans, drop_rate, small_input, return_features, fused)


@register
def skipblocknet_l(
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.2,
    small_input: bool = False,
    return_features: ReturnFeatures = "none",
    fused: Fused = "auto",
) -> SkipblockNet:
    """SkipblockNet-L, 7.1 million parameters. The arguments are those of `SkipblockNet`."""
    return _build("skipblocknet_l", num_classes, in_chans, drop_rate, small_input, return_features, fused)
