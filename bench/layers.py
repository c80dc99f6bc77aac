"""Where the milliseconds of SkipblockNet-M go on the CPU: every instruction of its program against what the machine could do at
best, and ONNX Runtime's time for the same kinds of layers by its own profiler.

Usage: python -m bench.layers [--threads 1] [--rounds 200]
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import biasloss_ext
from biasloss_ext import optimize_for_inference
from biasloss_ext.benchmarks.contender import Unavailable
from biasloss_ext.benchmarks.peers import runtimes
from biasloss_ext.models import skipblocknet_m
from biasloss_ext.nn.program import NetworkProgram, Segment
from biasloss_ext.ops.program.code import Instruction, Operation, instructions
from biasloss_ext.ops.program.op import program

KINDS = {
    Operation.CONVOLUTION: "stem",
    Operation.EXPAND_DEPTHWISE: "convolutions",
    Operation.DEPTHWISE: "convolutions",
    Operation.POINTWISE: "convolutions",
    Operation.SQUEEZE_EXCITE: "gates and linear layers",
    Operation.LINEAR: "gates and linear layers",
}


class Work(NamedTuple):
    """Of an instruction: its result, multiply-adds, and values that it reads and writes."""

    text: str
    shape: tuple[int, ...]
    multiply_adds: int
    values: int


def work_of(i: Instruction, shapes: dict[int, tuple[int, ...]], constants: list[Tensor]) -> Work:
    x, own = shapes[i.input], constants[i.constants :]
    rows, columns = (-(-size // i.stride) for size in x[2:]) if len(x) == 4 else (1, 1)
    positions, inner = x[0] * rows * columns, prod(x[2:]) * x[0]
    match i.operation:
        case Operation.EXPAND_DEPTHWISE:
            channels, kernel = own[2].shape[0], own[2].shape[2]
            text = f"{x[1]} -> {channels}, {kernel}x{kernel}, stride {i.stride}"
            products = inner * x[1] * channels + positions * channels * kernel**2
            weights = own[0].numel() + own[2].numel()
            shape: tuple[int, ...] = (x[0], channels, rows, columns)
        case Operation.POINTWISE:
            channels = own[1].numel()
            text, products, weights = f"{x[1]} -> {channels}", inner * x[1] * channels, own[0].numel()
            shape = (x[0], channels, *x[2:])
        case Operation.DEPTHWISE | Operation.CONVOLUTION:
            channels, inputs, kernel, _ = own[0].shape
            text, weights = f"{inputs} -> {channels}, {kernel}x{kernel}, stride {i.stride}", own[0].numel()
            shape, products = (x[0], channels, rows, columns), positions * own[0].numel()
        case Operation.SQUEEZE_EXCITE | Operation.LINEAR:
            weights = sum(w.numel() for w in own[: 4 if i.operation == Operation.SQUEEZE_EXCITE else 1] if w.dim() == 2)
            shape = (x[0], own[0].shape[0]) if i.operation == Operation.LINEAR else x
            text, products = f"{x[1]} -> {shape[1]}", x[0] * weights
        case Operation.AVERAGE:
            text, products, weights, shape = f"{x[1]}", 0, 0, (*x[:2], *shapes[i.other][2:])
        case _:
            text, products, weights, shape = f"{x[1]}", 0, 0, x[:2] if i.operation == Operation.POOL else x
    residual = prod(shape) if i.operation == Operation.POINTWISE and i.other >= 0 else 0
    return Work(text, shape, products, prod(x) + prod(shape) + residual + weights)


def least_seconds(function: Callable[[], Any], rounds: int) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return min(seconds() for _ in range(rounds))


def machine() -> tuple[float, float]:
    """Multiply-adds a second, as PyTorch's product of small matrices reaches, and bytes a second of a sum over 24 MiB."""
    size = 256  # a product is over before much else can get in between
    a, large = torch.randn(size, size), torch.randn(6 << 20)
    return size**3 / least_seconds(lambda: a @ a, 500), large.numel() * 4 / least_seconds(large.sum, 50)


def nanoseconds_of(segment: Segment, x: Tensor, rounds: int) -> list[int]:
    """The least of every row of the code."""
    count_into = ctypes.CDLL(str(Path(biasloss_ext.__file__).parent / "_ops.so")).biasloss_time_program
    rows = len(instructions(segment.code))
    least = [1 << 62] * rows
    for _ in range(rounds):
        times = (ctypes.c_int64 * rows)()
        count_into(times)
        program.native(x, segment.constants, segment.code)
        count_into(None)
        least = [min(pair) for pair in zip(least, times, strict=True)]
    return least


def onnx_runtime_kinds(model: nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """Microseconds of ONNX Runtime by kind of layer: the least of every node, added up."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        with runtimes._exported(model, x) as path:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(rounds):
            session.run(None, {session.get_inputs()[0].name: x.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[str, tuple[str, float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind, before = _onnx_kind(event["args"]), nodes.get(event["name"], ("", float("inf")))[1]
            nodes[event["name"]] = (kind, min(before, event["dur"]))
    kinds: dict[str, float] = collections.defaultdict(float)
    for kind, microseconds in nodes.values():
        kinds[kind] += microseconds
    return kinds


def _onnx_kind(arguments: dict[str, Any]) -> str:
    shapes = [shape for entry in arguments.get("input_type_shape", []) for shape in entry.values()]
    if arguments["op_name"] == "Conv" and len(shapes) > 1:
        inputs = shapes[0]
        if inputs[1] <= 4:
            return "stem"
        return "gates and linear layers" if inputs[2:] == [1, 1] else "convolutions"
    return "gates and linear layers" if arguments["op_name"] in ("Gemm", "MatMul", "FusedGemm") else "others"


def lines(model: nn.Module, x: Tensor, rounds: int) -> Iterator[str]:
    peak, bandwidth = machine()
    yield f"{peak / 1e9:.1f} GMAC/s, {bandwidth / 1e9:.1f} GB/s; microseconds, least of {rounds}"
    optimized = optimize_for_inference(model)
    optimized(x)
    assert isinstance(optimized.forward, NetworkProgram) and optimized.forward._made is not None
    (segment,) = optimized.forward._made.segments
    ours: dict[str, float] = collections.defaultdict(float)
    floors: dict[str, float] = collections.defaultdict(float)
    shapes: dict[int, tuple[int, ...]] = {0: tuple(x.shape)}
    for i, nanoseconds in zip(instructions(segment.code), nanoseconds_of(segment, x, rounds), strict=True):
        kind = KINDS.get(Operation(i.operation), "others")
        ours[kind] += nanoseconds / 1e3
        if i.operation == Operation.RELEASE:
            continue
        work = work_of(i, shapes, segment.constants)
        shapes[i.output] = work.shape
        if i.pooled >= 0:
            shapes[i.pooled] = work.shape[:2]
        # The maps of one image and the weights of a layer lie in the last cache at best: what is read from memory alone,
        # the weights of linear layers, is bound by it.
        floor = max(work.multiply_adds / peak, work.values * 4 / bandwidth if kind.startswith("gates") else 0) * 1e6
        floors[kind] += floor
        size = "x".join(map(str, shapes[i.input][2:]))
        name = Operation(i.operation).name.lower()
        yield f"{name:16} {work.text:28} {size:8} {work.multiply_adds / 1e6:7.2f} M {floor:7.1f} {nanoseconds / 1e3:7.1f}"
    try:
        peer = onnx_runtime_kinds(model, x, rounds)
    except (ImportError, Unavailable) as error:
        yield f"ONNX Runtime: {error}"
        peer = {}
    yield f"{'':24} {'floor':>8} {'ours':>8} {'ONNX Runtime':>13}"
    for kind in (*dict.fromkeys(KINDS.values()), "others"):
        yield f"{kind:24} {floors[kind]:8.0f} {ours[kind]:8.0f} {peer.get(kind, float('nan')):13.0f}"
    yield f"{'all':24} {sum(floors.values()):8.0f} {sum(ours.values()):8.0f} {sum(peer.values()):13.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        for line in lines(skipblocknet_m().eval(), torch.randn(options.batch, 3, 224, 224), options.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
