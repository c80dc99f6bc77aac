"""Every shape that is measured; those of the blocks' ops are in `block_shapes`."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from biasloss_ext.benchmarks import block_shapes
from biasloss_ext.benchmarks.contender import Workload

BATCH = 128
BATCH_SWEEP = (1, 8, 32, 128, 512)
CLASS_SWEEP = (10, 100, 1000, 10000)
QUICK_TRAINING_BATCH = 4
GPU_BATCH_SWEEP = (1, 8, 32, 128, 256, 1024)

# The last feature maps of SkipblockNet-M at 224 x 224 and of a CIFAR network, with ImageNet's and CIFAR-100's classes.
LAST_MAPS = (((960, 7, 7), 1000), ((512, 4, 4), 100))
TINY_MAPS = (((16, 3, 3), 10),)

# Networks that train on images of 32 x 32; quick runs on CPUs have the first alone.
SMALL_IMAGES = ("skipblocknet_xs_small", "skipblocknet_m_small")


def workloads(op: str, device_type: str, *, quick: bool = False, tiny: bool = False) -> list[Workload]:
    """The workloads of an op on a kind of device.

    Args:
        op: name of the op.
        device_type: "cpu" or "cuda".
        quick: those that fit into a run of under three minutes on two cores.
        tiny: shapes that run the code and say nothing about speed, for tests.
    """
    if op == "skipblocknet":
        return _network(device_type, quick, tiny)
    if op in SMALL_IMAGES:
        return _small_images(op, device_type, quick, tiny)
    if op in block_shapes.SHAPES:
        return block_shapes.workloads(op, device_type, quick=quick, tiny=tiny)
    return _last_maps(op, device_type, quick, tiny)


def _last_maps(op: str, device_type: str, quick: bool, tiny: bool) -> list[Workload]:
    shapes = [
        Workload(op, 4 if tiny else BATCH, sample, classes if op == "bias_loss" else 0, backward=op == "bias_loss")
        for sample, classes in (TINY_MAPS if tiny else LAST_MAPS)
    ]
    replace, large = dataclasses.replace, shapes[0]
    listed = [replace(shape, channels_last=layout) for shape, layout in itertools.product(shapes, (False, True))]
    if device_type == "cuda":
        listed.append(replace(large, batch=256, dtype=torch.bfloat16))
    if quick or tiny:
        return listed
    listed += [replace(shape, one_set=True) for shape in shapes]
    listed += [replace(large, dtype=torch.bfloat16, channels_last=layout) for layout in (False, True)]
    listed.append(replace(large, dtype=torch.float16))
    sweep = GPU_BATCH_SWEEP if device_type == "cuda" else BATCH_SWEEP
    listed += [replace(large, batch=batch, axis="batch") for batch in sweep]
    if op == "bias_loss":
        listed.append(replace(large, backward=False))
        listed += [replace(large, classes=classes, axis="classes") for classes in CLASS_SWEEP]
    return listed


def _network(device_type: str, quick: bool, tiny: bool) -> list[Workload]:
    size = 64 if tiny else 224
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    network = Workload("skipblocknet", 1, (3, size, size), 10 if tiny else 1000, dtype=dtype, channels_last=None)
    large = 4 if tiny else 256 if device_type == "cuda" else 16
    one, many = network, dataclasses.replace(network, batch=large)
    training = dataclasses.replace(many, backward=True)
    if tiny:
        return [many, training]
    if quick and device_type == "cpu":
        return [one, dataclasses.replace(training, batch=QUICK_TRAINING_BATCH)]
    return [one, many, training]


def _small_images(op: str, device_type: str, quick: bool, tiny: bool) -> list[Workload]:
    if quick and device_type == "cpu" and op != SMALL_IMAGES[0]:
        return []
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    batch = 4 if tiny else BATCH
    return [Workload(op, batch, (3, 32, 32), 10, dtype=dtype, channels_last=None, backward=True)]
