"""Weights from files of other programs: found, renamed, and fitted to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.optional import optional

State = dict[str, Any]

# Where programs keep the state_dict in a checkpoint; a moving average is what one evaluates with.
_PLACES = ("ema", "state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict", "net", "network")
# What DistributedDataParallel, torch.compile, Lightning and the moving average put before names.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")


def load_weights(model: nn.Module, path: Path, title: str, notes: list[str] | None = None) -> None:
    """Loads a state_dict, or the one in a checkpoint of this or another program.

    Names may bear a prefix that wrappers put before them. Where only the classifier differs in its number of classes,
    it keeps its initial weights.

    Args:
        title: what the model is called in messages.
        notes: takes a sentence about what was not loaded; None requires everything to be loaded.

    Raises:
        UserError: no such file, not a file of weights, or weights of another model.
    """
    own = model.state_dict()
    state = _without_prefix(_state_dict(path), own)
    differing = _differing(own, state)
    if differing and notes is not None and (classifier := _classifier(own, state, differing)):
        classes, given = (len(weights[classifier[0]]) for weights in (own, state))
        state = {**state, **{name: own[name] for name in classifier}}
        notes.append(
            f"{path} has {given} classes, the run has {classes}: the classifier ({', '.join(classifier)}) starts at random"
        )
    elif differing:
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        other = [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(differing.difference(missing, unknown))
        ]
        lists = (("missing", missing), ("unknown", unknown), ("of another shape", other))
        parts = [f"{len(names)} {what}, as {', '.join(names[:2])}" for what, names in lists if names]
        raise UserError(f"{path} is a checkpoint of another model than {title}: {'; '.join(parts)}")
    model.load_state_dict(state)


def _state_dict(path: Path) -> State:
    if not path.is_file():
        raise UserError(f"there is no file {path} to take weights from")
    content = _content(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a file of weights: it holds a {type(content).__name__}")
    for place in _PLACES:
        inner = content.get(place)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            content = inner
            break
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} is not a file of weights: there is no tensor in it")
    return state


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        read = optional("safetensors.torch", f"{path}").load_file
    else:

        def read(file: Path) -> Any:
            return torch.load(file, map_location="cpu", weights_only=True)

    try:
        return read(path)
    except Exception as error:  # the file can be anything
        cause = (str(error) or type(error).__name__).splitlines()[0]
        if "weights_only" in str(error):
            cause = "it holds Python objects in addition to the tensors; save model.state_dict() instead of the model"
        raise UserError(f"{path} is not a file of weights: {cause}") from None


def _without_prefix(state: State, own: State) -> State:
    """The names as the model has them: taken as they are where they fit best so, else without a wrapper's prefix."""
    best, found = state, len(own.keys() & state.keys())
    for _ in range(3):  # wrappers around wrappers
        for prefix in _PREFIXES:
            # What does not bear the prefix is the wrapper's own, as the counter of a moving average.
            shorter = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if len(shorter) * 2 > len(state):
                state = shorter
                if len(own.keys() & state.keys()) > found:
                    best, found = state, len(own.keys() & state.keys())
                break
    return best


def _differing(own: State, given: State) -> set[str]:
    return {name for name in own.keys() | given.keys() if _shape(own.get(name)) != _shape(given.get(name))}


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)


def _classifier(own: State, given: State, differing: set[str]) -> list[str] | None:
    """The weights and biases that differ, if they all do so in one number of outputs."""
    shapes = [(_shape(own.get(name)), _shape(given.get(name))) for name in differing]
    if not all(isinstance(shape, tuple) and shape for pair in shapes for shape in pair):
        return None
    if (
        any(mine[1:] != theirs[1:] for mine, theirs in shapes)
        or len({(mine[0], theirs[0]) for mine, theirs in shapes}) != 1
    ):
        return None
    return sorted(differing, reverse=True)  # the weight first
