"""These tests need Triton's interpreter; tests/ops/test_triton_interpreter.py runs them in a process that has it."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
