"""The models in timm's registry. `timm_hook` imports this after timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from biasloss_ext.models import variants
from biasloss_ext.models.skipblocknet import default_cfg

default_cfgs = generate_default_cfgs({name: default_cfg() for name in variants.VARIANTS})


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    builder = getattr(variants, name)

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        # features_only=True needs a way to reach inside: "fx" cuts the traced graph at the modules of feature_info.
        model: nn.Module = build_model_with_cfg(builder, name, pretrained, feature_cfg={"feature_cls": "fx"}, **options)
        return model

    build.__name__ = name
    build.__doc__ = builder.__doc__
    return build


for _name in variants.VARIANTS:
    register_model(_entrypoint(_name))
