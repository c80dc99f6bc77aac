"""One archive of everything that a run has left so far."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

LARGEST_FILE = 2 << 20  # bytes; of a longer log the end is kept


def write(folder: Path, archive: Path) -> None:
    """Put the files of ``folder`` into ``archive``, a ``.tgz``, in place of what it held."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = _end_of(path)
            entry = tarfile.TarInfo(str(path.relative_to(folder)))
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            file.addfile(entry, io.BytesIO(content))
    os.replace(partial, archive)


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LARGEST_FILE, 0))
        return file.read(LARGEST_FILE)
