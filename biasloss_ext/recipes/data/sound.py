"""Broken image files, found before the first step."""

from __future__ import annotations

from pathlib import Path

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import Data
from biasloss_ext.recipes.data.folder import FolderData
from biasloss_ext.recipes.processes import Processes

_found: dict[tuple[object, ...], list[tuple[Path, str]]] = {}  # a comparison opens the same folder many times


def check_images(data: Data, here: Processes, *, skip_broken: bool = False) -> list[str]:
    """Reads every image file once, shared among all processes, and tells all of them of those that are broken.

    Args:
        skip_broken: broken files are left out of the data set instead.

    Returns:
        Sentences for the user.

    Raises:
        UserError: files are broken.
    """
    if not isinstance(data, FolderData):
        return []
    key = data.listing
    if key not in _found:
        parts = here.gather_objects(data.broken(here.number, here.count))
        _found[key] = sorted(pair for part in parts[: here.count] for pair in part)
    broken = _found[key]
    if not broken:
        return []
    path, reason = broken[0]
    more = f" and {len(broken) - 1} more cannot be read" if len(broken) > 1 else ""
    if not skip_broken:
        raise UserError(
            f"cannot read the image {path}: {reason}{more}; repair or remove {'them' if more else 'it'}, or leave"
            f" {'them' if more else 'it'} out with --skip-broken"
        )
    data.leave_out({path for path, _ in broken})
    return [f"left out as broken: {path} ({reason}){f' and {len(broken) - 1} more' if more else ''}"]
