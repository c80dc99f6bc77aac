"""Broken image files, found before the first step."""

from __future__ import annotations

from collections.abc import Iterator

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import Data
from biasloss_ext.recipes.data.folder import FolderData
from biasloss_ext.recipes.data.images import Broken, Verdict
from biasloss_ext.recipes.data.packed import PackedData
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.processes import Processes

_found: dict[tuple[object, ...], list[Broken]] = {}  # a comparison opens the same folder many times


LARGE = 1000  # files, from which on a bar shows how many have been read


def check_images(
    data: Data, here: Processes, *, skip_broken: bool = False, display: Display | None = None
) -> list[Broken]:
    """Reads every image file once, shared among all processes, and reports the broken ones to all of them.

    Args:
        skip_broken: broken files are left out of the data set instead.
        display: shows a bar there, for a large folder on a terminal.

    Returns:
        The files that were left out, each with the reason; of packed images those that packing left out.

    Raises:
        UserError: files are broken.
    """
    if isinstance(data, PackedData):
        return data.left_out
    if not isinstance(data, FolderData):
        return []
    key = data.listing
    if key not in _found:

        def watch(verdicts: Iterator[Verdict], count: int) -> Iterator[Verdict]:
            if display is None or count < LARGE:
                return verdicts
            return display.counted("reading every image", verdicts, count)

        parts = here.gather_objects(data.broken(here.number, here.count, watch))
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
    return broken


def left_out_note(broken: list[Broken]) -> list[str]:
    """What the user is told of files that were left out; the report names them all."""
    if not broken:
        return []
    path, reason = broken[0]
    more = f" and {len(broken) - 1} more, all named in the report" if len(broken) > 1 else ""
    return [f"left out as broken: {path} ({reason}){more}"]
