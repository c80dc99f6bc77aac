"""Files of weights from this and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.weights import load_weights
from tests.recipes.tiny import SmallLinear, assert_same


def _own() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return SmallLinear(2).state_dict()


def _prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in _own().items()}


FILES: dict[str, Any] = {
    "plain": _own,
    "data parallel": lambda: _prefixed("module."),
    "compiled": lambda: _prefixed("_orig_mod."),
    "compiled and distributed": lambda: _prefixed("module._orig_mod."),
    "lightning": lambda: {"epoch": 3, "state_dict": _prefixed("model."), "pytorch-lightning_version": "2"},
    "timm": lambda: {"state_dict": {k: v + 1 for k, v in _own().items()}, "state_dict_ema": _own(), "epoch": 1},
    "average": lambda: {**_prefixed("module."), "n_averaged": torch.tensor(3)},
    "torchvision": lambda: {"model": _own(), "optimizer": {}, "args": None},
    "model_state_dict": lambda: {"model_state_dict": _prefixed("module.")},
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_of_other_programs(tmp_path: Path, kind: str) -> None:
    torch.save(FILES[kind](), tmp_path / "weights.pt")
    model, notes = SmallLinear(2), []
    load_weights(model, tmp_path / "weights.pt", "linear", notes)
    assert_same(dict(model.state_dict()), dict(_own()))
    assert notes == []


def test_weights_of_another_model(tmp_path: Path) -> None:
    for state, said in (
        ({"module.other": torch.ones(2)}, r"4 missing, as hidden.bias, hidden.weight; 1 unknown, as "),
        ({**_own(), "more.weight": torch.ones(2)}, r"1 unknown, as more.weight"),
        (SmallLinear(2, size=8).state_dict(), r"1 of another shape, as hidden.weight \(8, 192\) for \(8, 768\)"),
    ):
        torch.save(state, tmp_path / "weights.pt")
        with pytest.raises(UserError, match=r"a checkpoint of another model than linear: " + said):
            load_weights(SmallLinear(2), tmp_path / "weights.pt", "linear", [])
    torch.save(SmallLinear(2), tmp_path / "weights.pt")
    with pytest.raises(
        UserError, match=r"holds Python objects in addition to the tensors; save model\.state_dict\(\) instead"
    ):
        load_weights(SmallLinear(2), tmp_path / "weights.pt", "linear", [])
    torch.save({"epoch": 3, "model": None}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="there is no tensor in it"):
        load_weights(SmallLinear(2), tmp_path / "weights.pt", "linear", [])
