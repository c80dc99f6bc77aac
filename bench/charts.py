"""Charts as SVG files that can be read on light and on dark pages, and that are the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

GRAY = "#7d7d7d"  # 4 to 1 against white and against the dark pages of GitHub and of the site
COLORS = ("#3b8fd4", "#e07b39", "#46a86a", "#a66fd0", "#c9a227", "#d0598b", "#5fb3b3", "#8a8f98", "#b5654a")
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "biasloss_ext",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.titlecolor": GRAY,
    "axes.titlesize": 10,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
}


@contextmanager
def chart(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw in, written to ``path`` when the block ends."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
