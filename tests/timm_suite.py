"""Runs timm's own tests of models on accelerated models. Nothing is downloaded.

    python -m tests.timm_suite CHECKOUT 'mobilenetv4_conv_small*' 'lcnet_050' [-- -k backward]

CHECKOUT is a source tree of timm, of which only tests/test_models.py is used, beside the installed package. Patterns choose
models by name. Options after -- go to pytest.

Two expectations are changed, since a graph that torch.fx records holds the plain layers: its results may differ from those of
the fused ones by rounding, and ``torch.jit.script`` of an accelerated model must raise.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

from biasloss_ext import accelerate, models
from biasloss_ext.report import KINDS

BITS = "torch.all(fx_outputs == outputs)"
ROUNDING = "torch.allclose(fx_outputs, outputs, rtol=1e-3, atol=1e-4)"
MARKERS = ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout")


class Plugin:
    """Leaves out tests of other models and those that download, and expects torch.jit.script to raise for fused layers."""

    def __init__(self, patterns: list[str]) -> None:
        self.patterns = patterns

    def pytest_configure(self, config: Any) -> None:
        for name in MARKERS:
            config.addinivalue_line("markers", f"{name}: of timm")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if self._is_wanted(item)]
        refusal = {"raises": RuntimeError, "reason": "torch.jit.script refuses fused layers"}
        for item in items:
            if item.originalname == "test_model_forward_torchscript":
                item.add_marker(pytest.mark.xfail(strict=True, **refusal))
            elif (
                item.originalname == "test_model_forward_fx_torchscript"
            ):  # timm keeps normalizations whole in its graphs
                item.add_marker(pytest.mark.xfail(strict=False, **refusal))
            elif item.originalname == "test_model_default_cfgs" and "skipblocknet" in item.name:
                reason = "SkipblockNet has no form without its pool"
                item.add_marker(pytest.mark.xfail(raises=ValueError, strict=True, reason=reason))

    def _is_wanted(self, item: Any) -> bool:
        name = item.callspec.params.get("model_name", "") if hasattr(item, "callspec") else ""
        if not isinstance(name, str) or "pretrained" in item.originalname:
            return False
        return any(fnmatch.fnmatch(name, p) for p in self.patterns)


assert models, "imported for its registration with timm"


def patch_timm(patterns: list[str]) -> None:
    """Let timm build accelerated models, and list those of the patterns alone."""
    create, listed = timm.create_model, timm.list_models

    def accelerated(name: str, *arguments: Any, **options: Any) -> nn.Module:
        model: nn.Module = create(name, *arguments, **options)
        report = accelerate(model)
        assert name.startswith("skipblocknet") or any(report.count(kind).fused for kind in KINDS), (
            f"nothing is fused: {report}"
        )
        return model

    def chosen(*arguments: Any, **options: Any) -> list[str]:
        return [name for name in listed(*arguments, **options) if any(fnmatch.fnmatch(name, p) for p in patterns)]

    timm.create_model, timm.list_models, timm.list_pretrained = accelerated, chosen, lambda *_, **__: []


def main() -> int:
    command = sys.argv[1:]
    split = command.index("--") if "--" in command else len(command)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN")
    options = parser.parse_args(command[:split])
    source = (options.checkout / "tests" / "test_models.py").read_text()
    if BITS not in source:
        parser.error(f"{options.checkout}/tests/test_models.py has no {BITS}: this version of timm is unknown")
    patch_timm(options.patterns)
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "test_models.py"
        tests.write_text(source.replace(BITS, ROUNDING))
        return int(
            pytest.main(
                [
                    str(tests),
                    f"--rootdir={folder}",
                    "-c",
                    "/dev/null",
                    "-p",
                    "no:cacheprovider",
                    "-q",
                    *command[split + 1 :],
                ],
                plugins=[Plugin(options.patterns)],
            )
        )


if __name__ == "__main__":
    sys.exit(main())
