"""Optimizer and learning rate of a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from biasloss_ext.recipes.recipe import Recipe


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, AdamW, or RMSprop with momentum; one kernel for all parameters where PyTorch has one."""
    parameters, lr, decay = model.parameters(), recipe.lr, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, eps=recipe.epsilon, weight_decay=decay, fused=True)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr, recipe.rms_decay, recipe.epsilon, decay, recipe.momentum)
    return torch.optim.SGD(parameters, lr, momentum=recipe.momentum, weight_decay=decay, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads a state, in the memory format of the parameters: PyTorch's fused kernels on CPUs read both in memory order."""
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The schedule, to be stepped after every optimizer step; ``steps`` are those of an epoch."""
    return LambdaLR(optimizer, lambda step: rate_factor(recipe, step / steps, 1 / steps))


def rate_factor(recipe: Recipe, epoch: float, step: float) -> float:
    """What ``recipe.lr`` is multiplied by at a moment of the run.

    Args:
        epoch: epochs done, with a fraction.
        step: the part of an epoch that one step is; the first step of a warm-up has a rate above 0.
    """
    factor = min(1.0, (epoch + step) / recipe.warmup_epochs) if recipe.warmup_epochs else 1.0
    if recipe.schedule == "cosine":
        return factor * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    # A quotient can come out a rounding below the whole number that it stands for.
    passed = sum(epoch + step / 2 >= milestone for milestone in recipe.milestones)
    return factor * recipe.gamma**passed
