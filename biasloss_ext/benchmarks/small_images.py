"""SkipblockNet XS and M on images of 32 x 32, as CIFAR has them: forward and backward with cross-entropy."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from biasloss_ext.benchmarks import skipblocknet
from biasloss_ext.benchmarks.contender import Contender, Op
from biasloss_ext.benchmarks.skipblocknet import in_torch
from biasloss_ext.models import skipblocknet_m, skipblocknet_xs


def _op(build: Callable[..., nn.Module]) -> Op:
    """The op that trains the network of ``build``."""

    def plain(classes: int) -> nn.Module:
        return build(classes, drop_rate=0.0, small_input=True, fused=False)

    def fused(classes: int) -> nn.Module:
        return build(classes, drop_rate=0.0, small_input=True, fused=True)

    contenders = (
        Contender("biasloss_ext, fused", "ours", in_torch(fused, plain), capturable=True, channels_last=True),
        Contender("eager NCHW", "peer", in_torch(plain, plain, channels_last=False), capturable=True),
        Contender("eager channels_last", "peer", in_torch(plain, plain), capturable=True, channels_last=True),
        # Last, so that a time limit leaves out none of the others.
        Contender(
            "torch.compile", "peer", in_torch(plain, plain, mode="default"), channels_last=True, slow_on=("cpu",)
        ),
    )
    return Op(
        f"{build.__name__}_small",
        contenders,
        skipblocknet.make_inputs,
        functools.partial(skipblocknet.cost_of, plain),
        skipblocknet.TOLERANCE,
        skipblocknet.DRAWS,
    )


OPS = tuple([_op(build) for build in (skipblocknet_xs, skipblocknet_m)])
