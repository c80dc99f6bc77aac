"""Feature diversity: variances beside NumPy's, layers chosen and named, table and plot."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from biasloss_ext.diversity import (
    default_layers,
    diversity_csv,
    diversity_plot,
    diversity_table,
    layer_variances,
    summarize,
)
from biasloss_ext.models import skipblocknet_xs


class Net(nn.Module):
    """With dropout and batch normalization, which behave otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.blocks = nn.Sequential(nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()), nn.Conv2d(5, 6, 1))
        self.towers = nn.ModuleList([nn.Conv2d(6, 2, 1), nn.Conv2d(6, 3, 1)])
        self.unused = nn.Conv2d(6, 6, 1)
        self.classifier = nn.Linear(5, 7)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.stem(images))
        return self.classifier(torch.cat([tower(maps).mean((2, 3)) for tower in self.towers], 1))


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_variances_are_numpys_of_the_evaluation_mode() -> None:
    net = _net().train()
    images = torch.randn(7, 3, 12, 10)
    batches = [images[:3], (images[3:6], torch.zeros(3)), [images[6:]]]  # bare, and as data loaders give them
    found = layer_variances(net, batches, ["blocks.1", "stem", "classifier"])
    assert list(found) == ["blocks.1", "stem", "classifier"]
    assert net.training
    assert not net.stem._forward_hooks
    net.eval()
    with torch.no_grad():
        stem = net.stem(images)
        expected = {"stem": stem, "blocks.1": net.blocks(stem), "classifier": net(images)}
    for layer, output in expected.items():
        variance = output.flatten(1).double().numpy().var(axis=1, ddof=1)
        np.testing.assert_allclose(found[layer].numpy(), variance, rtol=1e-5)


def test_default_layers_are_the_blocks_that_give_maps() -> None:
    assert default_layers(_net()) == [
        "stem", "blocks.0", "blocks.1", "towers.0", "towers.1", "unused", "classifier",
    ]  # fmt: skip
    found = layer_variances(_net(), [torch.randn(2, 3, 8, 8)])
    assert list(found) == ["stem", "blocks.0", "blocks.1", "towers.0", "towers.1"]

    layers = list(layer_variances(skipblocknet_xs(num_classes=3), [torch.randn(2, 3, 32, 32)]))
    assert layers[:3] == ["first_layer", "base_block", "blocks.0.0"]
    assert layers[-1] == "conv"  # the features that Bias Loss looks at
    assert "classifier" not in layers


@pytest.mark.parametrize(
    ("layers", "batches", "message"),
    [
        (["blocks.7"], [torch.randn(2, 3, 8, 8)], r"the model has no layer 'blocks.7'; similar ones: blocks"),
        ([""], [torch.randn(2, 3, 8, 8)], "the model has no layer ''"),
        (["unused"], [torch.randn(2, 3, 8, 8)], "the layer 'unused' did not run"),
        (["stem"], [], "there is nothing to measure"),
        (None, [], "there is nothing to measure"),
    ],
)
def test_errors(layers: Any, batches: list[Tensor], message: str) -> None:
    net = _net()
    with pytest.raises(ValueError, match=message):
        layer_variances(net, batches, layers)
    assert not any(module._forward_hooks for module in net.modules())


def test_an_output_that_is_no_tensor_is_named() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ValueError, match=r"the output of the layer '0' must be a floating-point tensor \(4, \*\), got"):
        layer_variances(nn.Sequential(Pair()), [torch.randn(4, 2)], ["0"])


def test_figures_beside_numpy() -> None:
    torch.manual_seed(0)
    variances = {"one": {"deep": torch.rand(101), "early": torch.rand(101)}, "two": {"deep": torch.rand(30) + 1}}
    rows = summarize(variances)
    assert [(row.model, row.layer, row.samples) for row in rows] == [
        ("one", "deep", 101),
        ("one", "early", 101),
        ("two", "deep", 30),
    ]
    both = np.concatenate([variances["one"]["deep"].numpy(), variances["two"]["deep"].numpy()]).astype(np.float64)
    for row in rows:
        values = variances[row.model][row.layer].numpy().astype(np.float64)
        assert row.mean == pytest.approx(values.mean(), rel=1e-12)
        for name, level in {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}.items():
            assert row.quantiles[name] == pytest.approx(np.quantile(values, level), rel=1e-12)
        pooled = both if row.layer == "deep" else values
        assert row.threshold == pytest.approx(np.median(pooled) / 2)
        assert row.below == pytest.approx((values < row.threshold).mean())
    assert summarize(variances, threshold=0.25)[1].below == pytest.approx(
        (variances["one"]["early"].numpy() < 0.25).mean()
    )


def test_table_csv_and_plot() -> None:
    rows = summarize({"one": {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}, "two": {"b": torch.zeros(2)}})
    written = list(csv.DictReader(io.StringIO(diversity_csv(rows))))
    assert [(row["model"], row["layer"], row["samples"]) for row in written] == [
        ("one", "a", "2"),
        ("one", "b", "1"),
        ("two", "b", "2"),
    ]
    assert float(written[0]["mean"]) == 1.5
    table = diversity_table(rows).splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [["| a", "one"], ["| b", "one"], ["| b", "two"]]
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert table[0].startswith("| layer | model | mean | q05 ")

    axes = diversity_plot(rows).axes[0]
    assert axes.get_yscale() == "linear"  # a zero has no logarithm
    assert axes.get_xlabel() == "position between the first and the last layer"
    alike = summarize(
        {"one": {"a": torch.ones(2), "b": torch.ones(2)}, "two": {"a": torch.ones(3), "b": torch.ones(1)}}
    )
    axes = diversity_plot(alike).axes[0]
    assert axes.get_yscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
