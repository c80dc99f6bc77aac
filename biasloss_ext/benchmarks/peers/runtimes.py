"""Inference outside PyTorch: ONNX Runtime and OpenVINO, both fed with the same exported file, and ncnn."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.benchmarks.contender import Unavailable

Scores = Callable[[Tensor], Tensor]


def onnx_runtime(model: nn.Module, images: Tensor) -> Scores:
    """``model`` in ONNX Runtime on the CPU, float32, with as many threads as PyTorch uses."""
    (onnxruntime,) = _on_cpu("ONNX Runtime", images, "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with _exported(model, images) as path:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def openvino(model: nn.Module, images: Tensor) -> Scores:
    """``model`` in OpenVINO on the CPU, float32, with as many threads as PyTorch uses."""
    (ov,) = _on_cpu("OpenVINO", images, "openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = ov.Core()
    with _exported(model, images) as path:
        loaded = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda batch: torch.from_numpy(loaded([batch.numpy()])[0])


def ncnn(model: nn.Module, images: Tensor) -> Scores:
    """``model`` in ncnn on the CPU, float32, with as many threads as PyTorch uses; image after image, since ncnn knows no
    batches."""
    runtime, pnnx = _on_cpu("ncnn", images, "ncnn", "pnnx")  # the latter converts
    network = runtime.Net()
    options = network.opt
    options.num_threads = torch.get_num_threads()
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
    options.use_bf16_storage = False
    with tempfile.TemporaryDirectory() as folder:
        traced = Path(folder) / "model.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated, but what pnnx reads
            torch.jit.trace(model, images[:1]).save(str(traced))
        shape = ",".join(map(str, images[:1].shape))
        command = [pnnx.EXEC_PATH, str(traced), f"inputshape=[{shape}]", "fp16=0"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        files = Path(folder) / "model.ncnn.param", Path(folder) / "model.ncnn.bin"
        if done.returncode or network.load_param(str(files[0])) or network.load_model(str(files[1])):
            raise Unavailable(f"pnnx cannot convert the network: {done.stderr.strip()[-200:]}")
    (source,), (sink,) = network.input_names(), network.output_names()

    def scores_of(image: Tensor) -> Tensor:
        extractor = network.create_extractor()
        extractor.input(source, runtime.Mat(image.numpy()))
        _, scores = extractor.extract(sink)
        return torch.from_numpy(scores.numpy().copy())

    return lambda batch: torch.stack([scores_of(image) for image in batch])


def _on_cpu(runtime: str, images: Tensor, *modules: str) -> list[Any]:
    """The modules of a runtime that is compared on CPUs."""
    if images.device.type != "cpu":
        raise Unavailable(f"{runtime} is compared on CPUs alone")
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise Unavailable(f"{runtime} cannot be imported: {error}") from None


@contextlib.contextmanager
def _exported(model: nn.Module, images: Tensor):  # type: ignore[no-untyped-def]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its steps
            program = torch.onnx.export(model, (images,), dynamo=True)
    except ImportError as error:  # onnx and onnxscript
        raise Unavailable(f"torch.onnx.export cannot run: {error}") from None
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path)
        yield path
