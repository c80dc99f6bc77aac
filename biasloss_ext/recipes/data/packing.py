"""Packing: every image of a folder is read and resized once, and stored in shards."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.folder import PACKED, Sample, find_images, without
from biasloss_ext.recipes.data.images import Broken, read_image, with_shorter_side
from biasloss_ext.recipes.data.shards import ENCODINGS, FORMAT, Packed, write_shard
from biasloss_ext.recipes.files import make_folder, write_text, writing

AHEAD = 64  # images that are read at a time, for each thread

Found = Packed | Broken
Watch = Callable[[Iterator[Found], int], Iterator[Found]]


@dataclass(frozen=True)
class Packing:
    """How images are packed.

    Attributes:
        side: pixels of the shorter side; smaller images stay as they are.
        encoding: "raw" for pixels as they are, or "jpeg".
        quality: of JPEG.
        shard_bytes: a shard is closed when it has so many.
        skip_broken: files that cannot be read are left out, and listed; otherwise the first one ends the packing.
        workers: threads that read and resize.
    """

    side: int = 256
    encoding: str = "raw"
    quality: int = 95
    shard_bytes: int = 128_000_000
    skip_broken: bool = False
    workers: int = 4

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise UserError(f"unknown encoding {self.encoding!r}: there are {', '.join(ENCODINGS)}")
        if self.side < 1:
            raise UserError(f"--side must be at least 1, got {self.side}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality must be in [1, 100], got {self.quality}")

    def stored(self, image: Image.Image) -> tuple[Image.Image, bytes]:
        """An image in the size in which it is stored, and its bytes."""
        if min(image.size) > self.side:
            image = with_shorter_side(image, self.side)
        if self.encoding == "raw":
            return image, image.tobytes()
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality)
        return image, file.getvalue()


def pack(source: Path, out: Path, packing: Packing, watch: Watch | None = None) -> dict[str, Any]:
    """Packs an image folder; ``out`` appears when all is written, or not at all.

    Args:
        watch: is handed an iterator over the images of a split and their number, and hands the images on.

    Returns:
        The content of packed.json.

    Raises:
        UserError: ``out`` has files, ``source`` is no image folder, a file is broken, or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: remove it, or choose another --out")
    found = find_images(source)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left
    make_folder(unfinished)
    try:
        listed: dict[str, Any] = {"format": FORMAT, "side": packing.side, "class_names": list(found.class_names)}
        left_out: list[Broken] = []
        for split, samples in (("train", found.train), ("test", found.test)):
            read = _read(source, samples, packing)
            images = _without_broken(read if watch is None else watch(read, len(samples)), packing, left_out)
            listed[split] = _write_shards(unfinished, split, images, packing)
            without(samples, {path for path, _ in left_out}, found.class_names)  # every class needs an image
        listed["left_out"] = [(str(path.relative_to(source)), reason) for path, reason in left_out]
        write_text(unfinished / PACKED, json.dumps(listed, indent=1) + "\n")
        with writing(out):
            os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return listed


def _read(source: Path, samples: list[Sample], packing: Packing) -> Iterator[Found]:
    """The images in order, or what is wrong with them: many at a time, but no more than memory allows."""

    def read(sample: Sample) -> Found:
        path, number = sample
        try:
            image, content = packing.stored(read_image(path))
        except UserError as error:
            return path, str(error).removeprefix(f"cannot read the image {path}: ")
        return Packed(str(path.relative_to(source)), number, image.height, image.width, content)

    threads = max(1, packing.workers)
    with ThreadPoolExecutor(threads) as pool:  # Pillow runs in parallel with Python
        for begin in range(0, len(samples), AHEAD * threads):
            yield from pool.map(read, samples[begin : begin + AHEAD * threads])


def _without_broken(found: Iterable[Found], packing: Packing, left_out: list[Broken]) -> Iterator[Packed]:
    """The images; the broken files go into ``left_out``."""
    for image in found:
        if isinstance(image, Packed):
            yield image
            continue
        left_out.append(image)
        if not packing.skip_broken:
            path, reason = image
            raise UserError(
                f"cannot read the image {path}: {reason}; repair or remove it, or leave it out with --skip-broken"
            )


def _write_shards(folder: Path, split: str, images: Iterator[Packed], packing: Packing) -> list[dict[str, Any]]:
    """Writes the images of a split; returns file name, number of images and bytes of every shard."""
    written: list[dict[str, Any]] = []

    def write(shard: list[Packed]) -> None:
        path = folder / f"{split}-{len(written):05d}.safetensors"
        write_shard(path, packing.encoding, shard)
        written.append({"file": path.name, "images": len(shard), "bytes": path.stat().st_size})

    shard: list[Packed] = []
    size = 0
    for image in images:
        shard.append(image)
        size += len(image.content)
        if size >= packing.shard_bytes:
            write(shard)
            shard, size = [], 0
    if shard:
        write(shard)
    return written
