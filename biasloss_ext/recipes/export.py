"""A trained model as an ONNX file that says how to use it, checked against ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.images import Preprocessing
from biasloss_ext.recipes.files import whole_file
from biasloss_ext.recipes.trained import load_described
from biasloss_ext.version import __version__

INPUT, OUTPUT = "images", "scores"
# Of the largest score. Networks in float32 differ by 1e-6 to 1e-5 between two runtimes.
ALLOWED = 1e-3
EXPORTED_BATCH = 2
CHECKED_BATCHES = (EXPORTED_BATCH, 5, 1)


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the ONNX file.
        difference: the largest between a score from ONNX Runtime and the same score from PyTorch.
        largest: the largest score, as an absolute value.
    """

    path: Path
    difference: float
    largest: float


def export(run: Path, out: Path) -> Exported:
    """Write the model of a training run as an ONNX file, for any number of images at a time.

    The file's metadata describe the images and the classes, see :func:`metadata`. ONNX Runtime runs the file on random images of
    several batch sizes before it gets its name.

    Args:
        run: the folder of a training run, or its checkpoint.
        out: the file to write.

    Raises:
        UserError: no checkpoint there, a model that ONNX cannot express, or other scores than PyTorch's. The file that was at
            ``out`` is then unchanged.
    """
    import onnx

    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write {out.name} into")
    model = load_described(run)
    preprocessing: Any = model.preprocessing
    shape = (len(preprocessing.mean), preprocessing.image_size, preprocessing.image_size)
    proto = _as_onnx(model, shape)
    onnx.helper.set_model_props(proto, metadata(model))
    with whole_file(out) as temporary:
        onnx.save(proto, temporary)
        difference, largest = _compare(model, temporary, shape)
        if not difference <= ALLOWED * largest:  # also NaN
            raise UserError(
                f"the scores of the exported model differ from PyTorch's by up to {difference:.2g}, scores reach {largest:.2g}:"
                f" expected at most {ALLOWED:g} of that, so {out} is not written"
            )
    return Exported(out, difference, largest)


def metadata(model: nn.Module) -> dict[str, str]:
    """What an ONNX file says of a model from :func:`load_described
    <biasloss_ext.recipes.trained.load_described>`.

    Returns:
        Values in JSON: "class_names", in the order of the scores; the attributes of
        :class:`Preprocessing <biasloss_ext.recipes.data.images.Preprocessing>`, of which "mean" and "deviation" are those of the
        channels of pixels in [0, 1]; and "biasloss_ext", the version of this package.
    """
    preprocessing: Any = model.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    values = {"class_names": model.class_names, **preprocessing.as_dict(), "biasloss_ext": __version__}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _as_onnx(model: nn.Module, shape: tuple[int, ...]) -> Any:
    images = torch.randn(EXPORTED_BATCH, *shape)
    batch = torch.export.Dim("batch", min=1, max=65536)
    names: Any = {"input_names": [INPUT], "output_names": [OUTPUT]}
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        exported: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    except ImportError:
        raise
    except Exception as error:  # whatever the exporter raises
        cause = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"the model cannot be exported to ONNX: {cause}") from None
    return exported.model_proto


def _compare(model: nn.Module, path: Path, shape: tuple[int, ...]) -> tuple[float, float]:
    """The largest difference between the scores from ONNX Runtime and from PyTorch, and the largest score."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences, scores = [], []
    for count in CHECKED_BATCHES:
        images = torch.randn(count, *shape)
        with torch.inference_mode():
            expected: Tensor = model(images).double()
        (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
        differences.append((torch.from_numpy(found).double() - expected).abs().max())
        scores.append(expected.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(scores).max())
