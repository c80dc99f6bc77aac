"""Small image folders, and files that are broken in one way each."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("daisy", "rose")


def write_folder(
    parent: Path, classes: Sequence[str] = CLASSES, images: int = 4, folders: Sequence[str] = ("train", "val")
) -> Path:
    """``parent/train/CLASS/0.png`` and so on; the brightness tells the class. Returns ``parent``."""
    generator = np.random.default_rng(0)
    for split in folders:
        for number, name in enumerate(classes):
            folder = parent / split / name
            folder.mkdir(parents=True)
            for image in range(images):
                pixels = generator.integers(0, 60, (40, 30, 3)) + 90 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}.png")
    return parent


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png() -> bytes:
    """Says that it has 20000 x 20000 pixels of one bit."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Name of a file to its bytes and a part of what is said of it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    return {
        "huge.png": (huge_png(), "exceeds limit"),
        "header.ppm": (b"P6\nnot a number\n255\n", "it is broken ("),
        "short.jpg": (encoded(noise, "JPEG")[:1500], "truncated"),
        "short.png": (encoded(noise, "PNG")[:2000], "truncated"),
        "short.bmp": (encoded(noise, "BMP")[:2000], "truncated"),
        "short.webp": (encoded(noise, "WEBP")[:500], ""),
        "empty.jpg": (b"", "it is not an image"),
        "text.png": (b"no image", "it is not an image"),
        "float.tif": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "its pixels have 32 bits"),
        "long.tiff": (encoded(Image.new("I", (8, 8), 70000), "TIFF"), "its pixels have 32 bits"),
    }
