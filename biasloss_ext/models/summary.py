"""A table of the published sizes, ours and the paper's."""

from __future__ import annotations

import torch

from biasloss_ext.models.multiply_adds import count_multiply_adds
from biasloss_ext.models.registry import create_model
from biasloss_ext.models.variants import VARIANTS


def variants_table() -> str:
    """A Markdown table: parameters for 1000 classes and multiply-adds at 224 x 224, ours and the paper's.

    The last column counts multiply-adds for `small_input=True` at 32 x 32 with 100 classes.
    """
    lines = [
        "| model | width | classifier width | parameters | paper | multiply-adds | paper"
        " | paper's top-1 | multiply-adds, 32 x 32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, variant in VARIANTS.items():
        with torch.device("meta"):
            model = create_model(name)
            small = create_model(name, num_classes=100, small_input=True)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        lines.append(
            f"| {name} | {variant.width} | {variant.classifier_width}"
            f" | {parameters:,} | {variant.paper_million_parameters} M"
            f" | {count_multiply_adds(model) / 1e6:.1f} M | {variant.paper_million_multiply_adds} M"
            f" | {variant.paper_top1} % | {count_multiply_adds(small, (3, 32, 32)) / 1e6:.1f} M |"
        )
    return "\n".join(lines)
