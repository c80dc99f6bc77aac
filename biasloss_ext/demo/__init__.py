"""``make demo``: Bias Loss against cross-entropy on handwritten digits, what it does to the features, what it costs."""

from biasloss_ext.demo.timings import TIMED_SHAPES, contenders

__all__ = ["TIMED_SHAPES", "contenders"]
