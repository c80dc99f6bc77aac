"""Image files: read as eight-bit color, upright, and prepared as a model takes them."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from biasloss_ext.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Verdict = tuple[Path, str | None]  # None of a file that can be read
Watch = Callable[[Iterator[Verdict], int], Iterator[Verdict]]
Box = tuple[int, int, int, int]  # left, top, right, bottom
BoxOf = Callable[[int, int], Box]  # from the width and height of an image
Broken = tuple[Path, str]  # a file that cannot be read, and why

# What Pillow has to say of a file is either an error, which is reported with the file's name, or of no use here.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before a model sees it in evaluation.

    Attributes:
        image_size: height and width of what the model takes.
        resize: the shorter side is brought to this length first; the middle of the result is taken,
            with a black border where it is smaller than the image.
        mean, deviation: of each channel of the image, as numbers in [0, 1]; what is subtracted, then divided by.
        interpolation: "bilinear" or "bicubic", both with antialiasing.
        gray: color is taken out.
    """

    image_size: int
    resize: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    interpolation: str = "bilinear"
    gray: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        """An image of any size to float32 (3, image_size, image_size)."""
        return self.normalized(pixels_of(self.fitted(image)))

    def fitted(self, image: Image.Image) -> Image.Image:
        """An image of any size to one of ``image_size``, before normalization."""
        image = image.convert("L").convert("RGB") if self.gray else image.convert("RGB")
        resized = with_shorter_side(_middle(image), self.resize, self.interpolation)
        left, top = (round((side - self.image_size) / 2) for side in resized.size)
        return resized.crop((left, top, left + self.image_size, top + self.image_size))

    def read(self, path: str | Path) -> Tensor:
        """An image file to float32 (3, image_size, image_size).

        Raises:
            UserError: the file cannot be read.
        """
        return self(read_image(path))

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 (\\*, 3, height, width) to float32, on the device of the pixels."""
        mean, deviation = (_per_channel(values, pixels.device) for values in (self.mean, self.deviation))
        numbers = torch.empty(pixels.shape, device=pixels.device)
        # In place, and on a CPU image by image, which stay in its cache: a third of the time.
        parts = zip(numbers, pixels, strict=True) if pixels.dim() > 3 and not pixels.is_cuda else [(numbers, pixels)]
        for part, given in parts:
            part.copy_(given).div_(255).sub_(mean).div_(deviation)
        return numbers

    def as_dict(self) -> dict[str, Any]:
        """All attributes by name, in plain types."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """The inverse of :meth:`as_dict`; `gray` was spelled "grey" once."""
        values = {"gray" if name == "grey" else name: value for name, value in values.items()}
        return Preprocessing(**{**values, "mean": tuple(values["mean"]), "deviation": tuple(values["deviation"])})


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF orientation says; of 16 bits a channel the upper 8 are taken.

    Raises:
        UserError: the file is missing, broken, too large, or of a kind whose range of values is unknown.
    """
    try:
        with Image.open(path) as image:
            return _upright(_rgb(image))
    except Exception as error:  # a broken file makes Pillow raise anything
        raise UserError(f"cannot read the image {path}: {_cause(error)}") from None


def with_shorter_side(image: Image.Image, length: int, interpolation: str = "bilinear") -> Image.Image:
    """An RGB image, resized until its shorter side has ``length``."""
    scale = length / min(image.size)
    width, height = (max(length, int(side * scale)) for side in image.size)
    return image.resize((width, height), INTERPOLATIONS[interpolation])


def read_crop(path: str | Path, box_of: BoxOf, size: int) -> Image.Image:
    """A part of an image file, resized to ``size`` x ``size``; otherwise as `read_image`.

    JPEG files are decoded at a half, a quarter or an eighth of their size if the part still has ``size`` pixels a side
    then: most of the time that a photograph takes is that of decoding it.

    Args:
        box_of: gives the part for the width and height of the upright image.

    Raises:
        UserError: as for `read_image`.
    """
    whole, box = None, None
    try:
        with Image.open(path) as image:
            if isinstance(image, JpegImageFile):
                whole = _upright_size(image)
                box = box_of(*whole)
                share = min(1.0, size / min(box[2] - box[0], box[3] - box[1]))
                image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
            decoded = _upright(_rgb(image))
    except Exception as error:  # as in read_image
        raise UserError(f"cannot read the image {path}: {_cause(error)}") from None
    if whole is None or box is None:
        whole = decoded.size
        box = box_of(*whole)
    across, down = decoded.width / whole[0], decoded.height / whole[1]
    part = decoded.crop((round(box[0] * across), round(box[1] * down), round(box[2] * across), round(box[3] * down)))
    return part.resize((size, size), Image.Resampling.BILINEAR)


@functools.lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(channels, 1, 1), kept: to move it to a GPU for every batch would wait for that GPU."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def problem_of(path: str | Path) -> str | None:
    """Why an image file cannot be read, or None. Reads all of it, but decodes JPEG at an eighth of the size."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (image.width // 8, image.height // 8))
            _rgb(image)
    except Exception as error:  # as above
        return _cause(error)
    return None


def broken_files(paths: Sequence[Path], workers: int = 0, watch: Watch | None = None) -> list[Broken]:
    """Those of the image files that cannot be read, each with the reason.

    Args:
        workers: threads that read; one where it is 0.
        watch: is handed an iterator over a verdict for each file and their number, and hands the verdicts on.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:  # decoding runs in parallel with Python
        verdicts = zip(paths, pool.map(problem_of, paths), strict=True)
        watched = verdicts if watch is None else watch(verdicts, len(paths))
        return [(path, reason) for path, reason in watched if reason is not None]


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and those below it, in order, without hidden ones."""
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(ENDINGS):
                yield Path(parent, name)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a very long or wide image: resized, the rest would take memory without end."""
    width, height = image.size
    longest = 4 * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = (max(0, side - longest) // 2 for side in (width, height))
    return image.crop((left, top, min(left + longest, width - left), min(top + longest, height - top)))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion cuts everything above 255 off.
        sixteen = np.asarray(image)
        converted = Image.fromarray((sixteen >> 8).astype(np.uint8)).convert("RGB")
        converted.info = image.info
        return converted
    if image.mode in ("I", "F"):
        raise UserError("its pixels have 32 bits, without a known range: convert it to 8 or 16 bits")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data say nothing about the orientation
        return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that `_upright` gives it."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # as above
        turned = False
    return (image.height, image.width) if turned else image.size


def _cause(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image"
    if isinstance(error, (UserError, OSError, Image.DecompressionBombError)):
        return getattr(error, "strerror", None) or text
    return f"it is broken ({text})"
