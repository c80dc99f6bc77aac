"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# CI draws the same cases every time: a failure there is the change's own. Elsewhere every run draws new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
