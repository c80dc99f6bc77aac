"""Shards: files of many images each, which were resized once; memory-mapped.

A shard is a safetensors file. Its metadata name the format and the encoding. Of n images it holds:

- ``pixels`` (bytes,), uint8: all images one after the other, as rows of RGB pixels ("raw") or as JPEG files ("jpeg");
- ``offsets`` (n + 1,), int64: where each image begins, and the end;
- ``sizes`` (n, 2), int32: height and width;
- ``classes`` (n,), int64;
- ``names`` (bytes,), uint8: the files that they come from, a JSON list.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.images import BoxOf, pixels_of
from biasloss_ext.recipes.files import writing

FORMAT = "biasloss packed images 1"
ENCODINGS = ("raw", "jpeg")
_TYPES = {
    "pixels": torch.uint8,
    "offsets": torch.int64,
    "sizes": torch.int32,
    "classes": torch.int64,
    "names": torch.uint8,
}


@dataclass(frozen=True)
class Packed:
    """One image of a shard: its bytes in the shard's encoding."""

    name: str
    number: int  # of its class
    height: int
    width: int
    content: bytes


def write_shard(path: Path, encoding: str, images: Sequence[Packed]) -> None:
    """Writes a shard.

    Raises:
        UserError: the file cannot be written.
    """
    names = json.dumps([image.name for image in images]).encode()
    tensors = {
        "pixels": np.frombuffer(b"".join(image.content for image in images), np.uint8),
        "offsets": np.cumsum([0, *(len(image.content) for image in images)], dtype=np.int64),
        "sizes": np.array([(image.height, image.width) for image in images], np.int32),
        "classes": np.array([image.number for image in images], np.int64),
        "names": np.frombuffer(names, np.uint8),
    }
    with writing(path):
        path.write_bytes(save(tensors, {"format": FORMAT, "encoding": encoding}))


class Shard:
    """The images of a shard, read from the mapped file when they are asked for.

    A copy for another process maps the file itself.

    Args:
        images: how many there should be.
        classes: how many there are.

    Raises:
        UserError: the file is missing, broken, or not such a shard.
    """

    def __init__(self, path: Path, images: int, classes: int) -> None:
        self.path, self._images, self._classes = path, images, classes
        if not path.is_file():
            raise UserError(f"{path} is missing: pack the images again")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                _expect(metadata.get("format") == FORMAT, f"its format is not {FORMAT!r}")
                _expect(set(file.keys()) == set(_TYPES), "it has other tensors than packed images have")
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in _TYPES}
            self.encoding = metadata.get("encoding", "")
            self._check(tensors)
            names = json.loads(tensors["names"].numpy().tobytes())
            _expect(len(names) == images, f"it has {len(names)} names of {images} images")
        except Exception as error:  # the file can be anything
            cause = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{path} cannot be read as packed images: {cause}; pack them again") from None
        self.names: list[str] = names
        self.classes: list[int] = tensors["classes"].tolist()
        self._pixels, self._offsets, self._sizes = (tensors[name].numpy() for name in ("pixels", "offsets", "sizes"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Shard, (self.path, self._images, self._classes)

    def __len__(self) -> int:
        return self._images

    def whole(self, row: int) -> Image.Image:
        """An image of the shard, RGB.

        Raises:
            UserError: its bytes are no image.
        """
        if self.encoding == "raw":
            return Image.fromarray(self._rows(row))
        return self._decoded(row)

    def part(self, row: int, box_of: BoxOf, size: int) -> Tensor:
        """A part of an image, resized, as uint8 (3, size, size); raises as :meth:`whole`.

        Args:
            box_of: gives the part for the width and height of the image.
        """
        height, width = self._sizes[row].tolist()
        left, top, right, bottom = box_of(width, height)
        if self.encoding != "raw":
            cut = self._decoded(row).crop((left, top, right, bottom))
            return pixels_of(cut.resize((size, size), Image.Resampling.BILINEAR))
        rows = np.ascontiguousarray(self._rows(row)[top:bottom, left:right])  # the rest stays on the disk
        channels = torch.from_numpy(rows).permute(2, 0, 1)[None]
        # The same values as Pillow's, in half of the time.
        return F.interpolate(channels, (size, size), mode="bilinear", antialias=True)[0]

    def _bytes(self, row: int) -> Any:
        return self._pixels[self._offsets[row] : self._offsets[row + 1]]

    def _rows(self, row: int) -> Any:
        return self._bytes(row).reshape(*self._sizes[row], 3)

    def _decoded(self, row: int) -> Image.Image:
        try:
            with Image.open(io.BytesIO(self._bytes(row))) as image:
                decoded: Image.Image = image.convert("RGB")
                return decoded
        except Exception as error:
            cause = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.path} is broken at {self.names[row]}: {cause}; pack the images again") from None

    def _check(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError if the tensors do not fit together."""
        count = self._images
        shapes = {"offsets": (count + 1,), "sizes": (count, 2), "classes": (count,)}
        for name, tensor in tensors.items():
            shape = shapes.get(name, (tensor.numel(),))
            _expect(
                tensor.dtype == _TYPES[name] and tensor.shape == shape,
                f"{name} are {tensor.dtype} {tuple(tensor.shape)}, expected {_TYPES[name]} {shape}",
            )
        lengths, sizes, classes = tensors["offsets"].diff(), tensors["sizes"].long(), tensors["classes"]
        _expect(self.encoding in ENCODINGS, f"its encoding is {self.encoding!r}, expected {' or '.join(ENCODINGS)}")
        whole = int(tensors["offsets"][0]) == 0 and int(tensors["offsets"][-1]) == tensors["pixels"].numel()
        _expect(whole and bool((lengths > 0).all()), "its images do not fill it")
        _expect(bool((sizes > 0).all()), "an image has no pixels")
        _expect(
            self.encoding != "raw" or torch.equal(lengths, 3 * sizes.prod(1)),
            "the bytes of an image do not fit its size",
        )
        _expect(bool(((classes >= 0) & (classes < self._classes)).all()), f"a class is not below {self._classes}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
