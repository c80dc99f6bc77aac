"""The classification head of the MobileNetV3 family."""

from __future__ import annotations

from torch import Tensor, nn


class ClassificationHead(nn.Sequential):
    """Global average pool, linear, hard-swish, dropout, linear.

    Input: (N, in_features, H, W), any floating dtype and memory format. Output: (N, num_classes), or (N, hidden_features) if
    num_classes is 0; the last layer is then an identity.
    """

    def __init__(self, in_features: int, hidden_features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_features),
            nn.Hardswish(),
            nn.Dropout(drop_rate),
            nn.Linear(hidden_features, num_classes) if num_classes > 0 else nn.Identity(),
        )

    def forward(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to scores, or with ``pre_logits`` to the input of the dropout, (N, hidden_features)."""
        return self.from_pooled(features.mean((2, 3)), pre_logits)

    def from_pooled(self, pooled: Tensor, pre_logits: bool = False) -> Tensor:
        """The same, from the global average pool of the features, (N, in_features)."""
        linear, activation, dropout, classifier = self
        hidden: Tensor = activation(linear(pooled))
        if pre_logits:
            return hidden
        scores: Tensor = classifier(dropout(hidden))
        return scores
