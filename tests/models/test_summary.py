"""The multiply-add counter and the table of sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch import nn

from biasloss_ext import models

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def test_multiply_adds_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8 x 16 x 16 outputs of 27 products
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # 8 x 16 x 16 outputs of 9 products
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),  # 5 outputs of 8 products
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert models.count_multiply_adds(model, (3, 32, 32)) == 2048 * 27 + 2048 * 9 + 40
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_multiply_adds_of_the_published_size() -> None:
    # The paper says 246 M for this size.
    assert round(models.count_multiply_adds(models.skipblocknet_m()) / 1e6) == 237


def test_documentation_holds_the_table_as_the_command_prints_it() -> None:
    setup = (
        f"import sys, runpy; sys.path[:0] = {sys.path}; runpy.run_module('biasloss_ext.models', run_name='__main__')"
    )
    printed = subprocess.run([sys.executable, "-c", setup], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("| model | width |")
    assert printed in DOCS.read_text()
