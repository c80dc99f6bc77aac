"""Inference outside PyTorch: ONNX Runtime and OpenVINO, both fed with the same exported file."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from biasloss_ext.benchmarks.contender import Unavailable

Scores = Callable[[Tensor], Tensor]


def onnx_runtime(model: nn.Module, images: Tensor) -> Scores:
    """``model`` in ONNX Runtime on the CPU, float32, with as many threads as PyTorch uses."""
    if images.device.type != "cpu":
        raise Unavailable("ONNX Runtime is compared on CPUs alone")
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"ONNX Runtime cannot be imported: {error}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with _exported(model, images) as path:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def openvino(model: nn.Module, images: Tensor) -> Scores:
    """``model`` in OpenVINO on the CPU, float32, with as many threads as PyTorch uses."""
    if images.device.type != "cpu":
        raise Unavailable("OpenVINO is compared on CPUs alone")
    try:
        import openvino as ov
    except ImportError as error:
        raise Unavailable(f"OpenVINO cannot be imported: {error}") from None
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = ov.Core()
    with _exported(model, images) as path:
        loaded = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda batch: torch.from_numpy(loaded([batch.numpy()])[0])


@contextlib.contextmanager
def _exported(model: nn.Module, images: Tensor):  # type: ignore[no-untyped-def]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter tells of its steps
            program = torch.onnx.export(model, (images,), dynamo=True)
    except ImportError as error:  # onnx and onnxscript
        raise Unavailable(f"torch.onnx.export cannot run: {error}") from None
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path)
        yield path
