"""Files that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from biasloss_ext.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Hands out a temporary path beside ``path`` and moves it there, flushed to the disk, when the block ends well.

    A process killed at any moment leaves the old file or the new one. The temporary name is always the same, so that
    what a killed process left is overwritten by the next. After an error in the block nothing is left.
    """
    # The ending is kept, since plotting libraries take the format from it.
    temporary = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name has to survive a loss of power too
    finally:
        os.close(folder)


def make_folder(path: Path) -> None:
    """Makes the folder and those above it where they are missing.

    Raises:
        UserError: it cannot be made, as where a file has that name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as a whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
