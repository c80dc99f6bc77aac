"""Files that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from biasloss_ext.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Hands out a temporary path next to ``path`` and moves it there, flushed to the disk, when the block ends well.

    A process killed at any moment leaves the old file or the new one. The temporary name is always the same, so that
    what a killed process left is overwritten by the next. After an error in the block nothing is left.

    Raises:
        UserError: the file cannot be written, as where the disk is full.
    """
    # The ending is kept, since plotting libraries take the format from it.
    temporary = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name has to survive a loss of power too
        finally:
            os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says against writing into a :class:`UserError` that names ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch.save reports its own surprise at a full disk
        if cause is None:
            raise
        kept = "; the file that was there is unchanged" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {cause.strerror or cause}{kept}") from None


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
