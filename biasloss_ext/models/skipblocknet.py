"""SkipblockNet (Abrahamyan et al., Bias Loss for Mobile Neural Networks, ICCV 2021, arXiv 2107.11170)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from biasloss_ext.functional import feature_variance
from biasloss_ext.models.hub import HubModel
from biasloss_ext.nn import (
    ClassificationHead,
    FusedConvNormActivation,
    FusedHead,
    FusedInvertedResidual,
    FusedSkipBlock,
    prepared_weights,
    round_channels,
)
from biasloss_ext.nn.conv_norm import conv_norm
from biasloss_ext.nn.fused_chain import Fused

ReturnFeatures = Literal["none", "features", "variance"]

MIN_IMAGE_SIZE = 32


class _Block(NamedTuple):
    """One inverted residual at width 1.0; the hidden channels are `expansion` times the channels that come in."""

    kernel_size: int
    expansion: float
    channels: int
    squeeze_excite: bool
    activation: type[nn.Module]
    stride: int


# Grouped as in the authors' checkpoint: a skip block adds to the output of the first group and of the second.
_STEM_CHANNELS = 16
_GROUPS = (
    (
        _Block(3, 4, 24, False, nn.ReLU, 2),
        _Block(3, 3, 24, False, nn.ReLU, 1),
        _Block(5, 3, 40, True, nn.ReLU, 2),
        _Block(5, 3, 40, True, nn.ReLU, 1),
        _Block(5, 6, 40, True, nn.Hardswish, 1),
    ),
    (
        _Block(3, 6, 80, False, nn.Hardswish, 2),
        _Block(3, 2.5, 80, False, nn.Hardswish, 1),
        _Block(3, 2.3, 80, False, nn.Hardswish, 1),
        _Block(3, 2.3, 80, False, nn.Hardswish, 1),
    ),
    (
        _Block(3, 6, 112, True, nn.Hardswish, 1),
        _Block(3, 6, 112, True, nn.Hardswish, 1),
    ),
    (
        _Block(5, 6, 160, True, nn.Hardswish, 2),
        _Block(5, 6, 160, True, nn.Hardswish, 1),
        _Block(5, 6, 160, True, nn.Hardswish, 1),
    ),
)


def default_cfg(
    num_classes: int = 1000, input_size: tuple[int, int, int] = (3, 224, 224), reduction: int = 32
) -> dict[str, Any]:
    """A model's description for timm: the images it expects, and the names of its first and last layers.

    The preprocessing is the one of the authors' evaluation.
    """
    return {
        "num_classes": num_classes,
        "input_size": input_size,
        "min_input_size": (input_size[0], MIN_IMAGE_SIZE, MIN_IMAGE_SIZE),
        "pool_size": tuple(-(-size // reduction) for size in input_size[1:]),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "first_layer.0",
        "classifier": "classifier.3",
    }


@torch.fx.wrap  # a leaf for torch.fx, which cannot trace a branch on a shape
def _check_images(images: Tensor, channels: int) -> None:
    shape = images.shape
    if len(shape) != 4 or shape[1] != channels or shape[2] < MIN_IMAGE_SIZE or shape[3] < MIN_IMAGE_SIZE:
        raise ValueError(
            f"images must be of shape (N, {channels}, H, W) with H and W at least {MIN_IMAGE_SIZE}, got {tuple(shape)}"
        )


class SkipblockNet(nn.Module, HubModel):
    """A MobileNetV3-style network in which two skip blocks carry the first block's map to later stages.

    Input: (N, in_chans, H, W), with H and W at least 32, square or not, contiguous or channels_last, in the floating dtype of the
    parameters (any dtype under autocast). Output: scores (N, num_classes), alone or after the features or their variance, see
    ``return_features``. For other inputs, a ValueError names the expected and the given shape.

    The features are those of Bias Loss: the map of the last convolution after normalization and activation,
    (N, num_features, H / 32, W / 32), sizes rounded up (H / 16, W / 16 with ``small_input``).

    Parameters and buffers have the names of the authors' checkpoints, so that `load_state_dict` takes the published checkpoint
    of SkipblockNet-M unchanged. The initial weights are distributed as the authors': convolutions normal with standard deviation
    sqrt(2 / (kernel area * output channels)), linear layers normal with standard deviation 0.01.

    Args:
        num_classes: number of scores; with 0 the model has no last layer and returns (N, head_hidden_size).
        in_chans: channels of the images.
        drop_rate: dropout before the last layer.
        small_input: for images of about 32 x 32. The first convolution has stride 1 instead of 2, so that every map is twice as
            high and wide. The parameters stay the same.
        width: multiplies the channels of every layer before the classifier, rounded by `round_channels`.
        classifier_width: units between the features and the scores; not multiplied by ``width``.
        return_features: what a call returns, in training and in evaluation; an attribute that can be changed at any time.
            "none": the scores.
            "features": the pair (features, scores), for ``FusedBiasLoss()(features, scores, target)``.
            "variance": the pair (variance, scores), for ``FusedBiasLoss()(None, scores, target, variance=variance)``. The
            variance is `feature_variance` of the features: (N,), float32 (float64 for float64), detached. The maps do not
            leave the model, and fused kernels do not even store them.
        fused: "auto" runs the blocks on fused kernels if these can run, and otherwise, or while a graph is exported, on the plain
            layers. True raises if they cannot run. False uses the plain layers. Parameters, names and checkpoints are the
            same; results differ only by rounding.

    These attributes are those of timm:

    - ``num_features``: channels of the features.
    - ``head_hidden_size``: ``classifier_width``.
    - ``feature_info``: for each reduction of the image size, its last module, with the channels and the reduction.
    - ``default_cfg``: the description for timm.

    With huggingface_hub installed, ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are those of
    ``PyTorchModelHubMixin``. ``from_pretrained`` also takes ``return_features`` and ``fused``, which are not saved.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        small_input: bool = False,
        *,
        width: float = 1.0,
        classifier_width: int = 1280,
        return_features: ReturnFeatures = "none",
        fused: Fused = "auto",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self._small_input, self._width = small_input, width
        self.return_features = return_features

        # Attribute names from here on are the checkpoint's.
        base_channels = round_channels(_STEM_CHANNELS * width)
        stem_stride = 1 if small_input else 2
        stem = conv_norm(in_chans, base_channels, 3, stem_stride)
        self.first_layer = FusedConvNormActivation(*stem, nn.Hardswish(), fused=fused)
        self.base_block = FusedInvertedResidual(base_channels, base_channels, base_channels, kernel_size=3, fused=fused)

        groups, widths = [], [base_channels]
        for group in _GROUPS:
            groups.append(_make_group(widths[-1], group, width, fused))
            widths.append(round_channels(group[-1].channels * width))
        self.blocks = nn.ModuleList(groups)

        hidden1, hidden2 = round_channels(base_channels * 6), round_channels(base_channels * 2.3)
        self.skip1 = FusedSkipBlock(base_channels, hidden1, widths[1], kernel_size=5, fused=fused)
        self.skip2 = FusedSkipBlock(base_channels, hidden2, widths[2], kernel_size=3, fused=fused)

        self.num_features = round_channels(widths[-1] * 6)
        self.conv = FusedHead(*conv_norm(widths[-1], self.num_features), nn.Hardswish(), fused=fused)

        self.head_hidden_size = classifier_width
        self.classifier = ClassificationHead(self.num_features, classifier_width, num_classes, drop_rate)

        last_modules = (
            ("base_block", base_channels),
            ("blocks.0.1", round_channels(_GROUPS[0][1].channels * width)),
            ("skip1", widths[1]),
            ("blocks.2", widths[3]),
            ("conv", self.num_features),
        )
        self.feature_info = [
            {"num_chs": channels, "reduction": stem_stride * 2**index, "module": module}
            for index, (module, channels) in enumerate(last_modules)
        ]
        size = 32 if small_input else 224
        self.default_cfg = default_cfg(num_classes, (in_chans, size, size), stem_stride * 16)
        self.apply(_init_weights)

    @property
    def return_features(self) -> ReturnFeatures:
        """What a call returns: "none", "features" or "variance", see the class."""
        return self._return_features

    @return_features.setter
    def return_features(self, value: ReturnFeatures) -> None:
        choices = get_args(ReturnFeatures)
        if value not in choices:
            raise ValueError(f"return_features must be one of {', '.join(choices)}, got {value!r}")
        self._return_features = value

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to features, see the class."""
        features: Tensor = self.conv(self._forward_blocks(x))
        return features

    def _forward_blocks(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_chans)
        base = self.base_block(self.first_layer(x))
        x = self.skip1(base, self.blocks[0](base))
        x = self.skip2(base, self.blocks[1](x))
        last: Tensor = self.blocks[3](self.blocks[2](x))
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to scores (N, num_classes), or with ``pre_logits`` to the input of the last layer's dropout."""
        scores: Tensor = self.classifier(x, pre_logits)
        return scores

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not prepared_weights.begin(self, x):
            return self._forward(x)
        try:
            return self._forward(x)
        finally:
            prepared_weights.end()

    def _forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        last = self._forward_blocks(x)
        if self.return_features != "features" and self.conv.can_pool(last):
            pooled, variance = self.conv.pool(last)
            scores = self.classifier.from_pooled(pooled.to(last.dtype))
            return (variance, scores) if self.return_features == "variance" else scores
        features = self.conv(last)
        scores = self.forward_head(features)
        if self.return_features == "features":
            return features, scores
        if self.return_features == "variance":
            return feature_variance(features), scores
        return scores

    def config(self) -> dict[str, Any]:
        """The arguments of `SkipblockNet` that build a model with these parameters."""
        return {
            "num_classes": self.num_classes,
            "in_chans": self.in_chans,
            "drop_rate": self.classifier[2].p,
            "small_input": self._small_input,
            "width": self._width,
            "classifier_width": self.head_hidden_size,
        }

    def get_classifier(self) -> nn.Module:
        """The last layer: `nn.Linear`, or `nn.Identity` if ``num_classes`` is 0."""
        return self.classifier[3]

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the last layer by a new one for ``num_classes`` classes, or by none for 0.

        Args:
            num_classes: number of classes.
            global_pool: "avg", the only pooling here.

        Raises:
            ValueError: ``global_pool`` is not "avg".
        """
        if global_pool != "avg":
            raise ValueError(f"global_pool must be 'avg', the only pooling of SkipblockNet, got {global_pool!r}")
        self.num_classes = num_classes
        hidden = self.classifier[0].weight
        self.classifier[3] = nn.Identity()
        if num_classes > 0:
            self.classifier[3] = nn.Linear(self.head_hidden_size, num_classes, device=hidden.device, dtype=hidden.dtype)
            _init_weights(self.classifier[3])


def _make_group(in_channels: int, group: tuple[_Block, ...], width: float, fused: Fused) -> nn.Sequential:
    blocks = []
    for block in group:
        hidden_channels = round_channels(in_channels * block.expansion)
        out_channels = round_channels(block.channels * width)
        blocks.append(
            FusedInvertedResidual(
                in_channels,
                hidden_channels,
                out_channels,
                block.kernel_size,
                block.stride,
                block.squeeze_excite,
                block.activation,
                fused=fused,
            )
        )
        in_channels = out_channels
    return nn.Sequential(*blocks)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
