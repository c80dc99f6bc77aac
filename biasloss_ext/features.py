"""Bias Loss on an existing model: take the feature maps from a module named by its path."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn


class FeatureTap(nn.Module):
    """Wraps a model so that it returns ``(features, output)``, the first two arguments of the loss.

    Args:
        model: any module that returns its scores; used as it is, not copied.
        module_name: path, as in ``model.named_modules()``, of the module whose output is the last feature map. In
            torchvision's MobileNetV3 that is ``"features"``, in timm's ``"conv_head"`` or ``"blocks"``, in a ResNet
            ``"layer4"``.

    Returns of a call:
        ``(features, output)``: the module's output, detached, any shape (N, *); and what the model returns. All
        arguments of the call are handed to the model.

    Wrap first, then compile or distribute: ``DistributedDataParallel(FeatureTap(model, "layer4"))``,
    ``torch.compile(FeatureTap(model, "layer4"), fullgraph=True)``. The state_dict is that of the model, without a
    prefix, so that checkpoints move between the two.

    Raises:
        ValueError: no module of that name; the message lists similar ones.
        TypeError: the module's output is not a tensor.
        RuntimeError: the module did not run in the call, so there are no features.

    Example::

        model = FeatureTap(torchvision.models.mobilenet_v3_large(), "features")
        loss = FusedBiasLoss()(*model(images), target)
    """

    model: nn.Module

    def __init__(self, model: nn.Module, module_name: str) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        if module_name not in modules or module_name == "":
            raise ValueError(f"the model has no module {module_name!r}; {similar_names(module_name, list(modules))}")
        self.model = model
        self.module_name = module_name
        self._features: Tensor | None = None
        modules[module_name].register_forward_hook(self._keep)
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Tensor, Any]:
        self._features = None
        output = self.model(*inputs, **keywords)
        features = self._features
        self._features = None  # the maps must not outlive the step
        if features is None:
            raise RuntimeError(f"the module {self.module_name!r} did not run in this call, so there are no features")
        return features, output

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"the output of {self.module_name!r} must be a tensor, got {type(output).__name__}")
        self._features = output.detach()


def similar_names(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or [n for n in names if n and "." not in n]
    return f"similar ones: {', '.join(close)}"


def _drop_prefix(module: FeatureTap, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}model.")]:
        state[prefix + key.removeprefix(f"{prefix}model.")] = state.pop(key)


def _add_prefix(module: FeatureTap, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {f"{prefix}{key}" for key in module.model.state_dict()}
    for key in [key for key in state if key in own]:
        state[f"{prefix}model.{key.removeprefix(prefix)}"] = state.pop(key)
