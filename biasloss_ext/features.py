"""Bias Loss on an existing model: returns the feature maps of a module, named by its path."""

from __future__ import annotations

import difflib
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

# The registries that a tap shares with its model, so that walking over the tap gives the model's names.
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class FeatureTap(nn.Module):
    """Wraps a model so that it returns ``(features, output)``, the first two arguments of the loss.

    Args:
        model: any module that returns its scores; it is not copied.
        module_name: path, as in ``model.named_modules()``, of the module whose output is the last feature map. It is
            ``"features"`` in torchvision's MobileNetV3, ``"conv_head"`` or ``"blocks"`` in timm's, and ``"layer4"`` in a ResNet.

    A call passes all its arguments to the model and returns ``(features, output)``: the output of the module, detached, any shape
    (N, *); and the output of the model. The features are what the module returned, even if a later layer overwrites them in
    place: the first call in each mode detects that, and the tap then makes copies.

    The tap has the parameters, buffers and children of the model under the model's own names. Checkpoints move between the two,
    and everything that finds tensors by name (``torch.func.functional_call``, distributed checkpoints, FSDP) works as on the
    model. ``tap.model`` is the model, unless the model has a child of that name. Other attributes that the tap lacks are the
    model's. Wrap first, then compile or distribute: ``DistributedDataParallel(FeatureTap(model, "layer4"))``,
    ``torch.compile(FeatureTap(model, "layer4"), fullgraph=True)``. Threads and the replicas of ``DataParallel`` may call one
    tap at the same time.

    The tap is a forward hook of the module. ``remove()``, the end of a ``with`` block or deleting the tap removes it.

    Raises:
        ValueError: the model has no module of that name; the message lists similar ones.
        TypeError: the module's output is not a tensor.
        RuntimeError: the module did not run in the call, so there are no features; or the tap was removed.

    Example:
        ```python
        with FeatureTap(torchvision.models.mobilenet_v3_large(), "features") as model:
            loss = FusedBiasLoss()(*model(images), target)
        ```
    """

    model: nn.Module

    def __init__(self, model: nn.Module, module_name: str) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        if module_name not in modules or module_name == "":
            raise ValueError(f"the model has no module {module_name!r}; {similar_names(module_name, list(modules))}")
        for name in _SHARED:
            self.__dict__[name] = model.__dict__[name]
        self.__dict__["_tapped_model"] = model  # not a child: its children are the tap's own
        self.training = model.training
        self._version = model._version
        self._capture = _Capture(module_name)
        modules[module_name].register_forward_hook(self._capture)
        self._remove_when_deleted()

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Tensor, Any]:
        model, capture = self._callable(), self._capture
        if torch.compiler.is_compiling():
            capture.traced = None
            output = model(*inputs, **keywords)
            features, capture.traced = capture.traced, None
        else:
            if not self._finalizer.alive:
                raise RuntimeError(f"the tap on {capture.module_name!r} was removed: make a new one")
            with capture.call() as call:
                output = model(*inputs, **keywords)
            # A module compiled by itself runs its hook while traced.
            features, capture.traced = call.features if call.features is not None else capture.traced, None
        if features is None:
            raise RuntimeError(self._why_no_features())
        return features, output

    def remove(self) -> None:
        """Remove the hook from the model. The tap cannot be called afterwards."""
        self._finalizer()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def train(self, mode: bool = True) -> FeatureTap:
        self.training = mode
        self._tapped_model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_tapped_model")
            if model is None or (name.startswith("__") and name.endswith("__")):
                raise
        if name == "model":
            return model
        if name == "module_name":
            return self._capture.module_name
        return getattr(model, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remove_when_deleted()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_finalizer"}

    # Operations on a module's own tensors are delegated to the model, which may override them.

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureTap:
        self._tapped_model._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._tapped_model._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._tapped_model._load_from_state_dict(*arguments)

    def _callable(self) -> nn.Module:
        """The model or, for a replica made by ``DataParallel``, a model with the replica's tensors."""
        model: nn.Module = self._tapped_model
        if not self.__dict__.get("_is_replica"):
            return model
        replica: nn.Module = model._replicate_for_data_parallel()
        replica._modules, replica._buffers = self._modules, self._buffers
        replica.__dict__.update(self._former_parameters)
        return replica

    def _remove_when_deleted(self) -> None:
        hooks = self._tapped_model.get_submodule(self._capture.module_name)._forward_hooks
        key = next((key for key, hook in hooks.items() if hook is self._capture), None)
        # The finalizer holds neither the tap nor the model.
        self.__dict__["_finalizer"] = weakref.finalize(self, _forget, weakref.ref(hooks), key)
        self._finalizer.atexit = False

    def _why_no_features(self) -> str:
        name = self._capture.module_name
        hooks = self._tapped_model.get_submodule(name)._forward_hooks
        if self._capture not in hooks.values():
            return f"the module {name!r} was replaced after the tap was made: make the tap last"
        return (
            f"the module {name!r} did not run in this call, so there are no features: name a module whose output the model"
            " uses; inside a block on fused kernels only the block itself runs"
        )


class _Call:
    """The features seen in one call of a tap."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.watched: Tensor | None = None  # shares the version counter of what the module returned
        self.version = 0
        self.training = False


class _Capture:
    """The forward hook of a tap. It refers to the tap only by the current calls of each thread."""

    def __init__(self, module_name: str) -> None:
        self.module_name = module_name
        self.traced: Tensor | None = None  # under torch.compile, which has no threads
        self._calls = _Calls()
        self._overwritten = False  # a later layer works in place
        self._left_alone: set[bool] = set()  # modes, as module.training, in which none does

    @contextmanager
    def call(self) -> Iterator[_Call]:
        """One call of the tap, in this thread."""
        call = _Call()
        self._calls.stack.append(call)
        try:
            yield call
        finally:
            self._calls.stack.pop()  # after an error too: the maps must not outlive the call
        self._learn(call)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self.traced = self._checked(output).detach().clone()
            return
        if not self._calls.stack:  # the model is called without the tap
            return
        call = self._calls.stack[-1]
        features = self._checked(output).detach()
        call.training = module.training
        if self._overwritten or module.training not in self._left_alone or output.is_inference():
            call.features = features.clone()
        else:
            call.features = features
        if output.is_inference():  # has no version
            call.watched = None
        else:
            call.watched, call.version = features, features._version

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"the output of {self.module_name!r} must be a tensor, got {type(output).__name__}")
        return output

    def _learn(self, call: _Call) -> None:
        """Record whether later layers overwrote the features in place."""
        if call.watched is None:
            return
        if call.watched._version == call.version:
            self._left_alone.add(call.training)
            return
        self._overwritten = True
        if call.features is call.watched:
            raise RuntimeError(
                f"a later layer overwrote the output of {self.module_name!r} in place, for the first time in this call, so"
                " the features are lost: call again, the tap makes a copy from now on"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"module_name": self.module_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Calls(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Call] = []


def _forget(hooks: weakref.ref[dict[int, Any]], key: int | None) -> None:
    found = hooks()
    if found is not None:
        found.pop(key, None)  # type: ignore[arg-type]


def similar_names(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or [n for n in names if n and "." not in n]
    return f"similar ones: {', '.join(close)}"
