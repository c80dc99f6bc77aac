"""Pages of the site that lie outside of docs/: README.md as the first page, and the files that pages link to.

On GitHub a page in docs/ links to ``../CHANGELOG.md`` and the README to ``docs/training.md``. On the site all of them lie side
by side, so these prefixes are dropped.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "SECURITY.md", "bench/NOTES.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    results = sorted(path for path in (ROOT / "bench" / "results").rglob("*.*"))
    for path in [*(ROOT / name for name in OUTSIDE), *results]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith("bench/"):
        return re.sub(r"\]\(\.\./(docs/)?", "](../", markdown)
    return re.sub(r"\]\((\.\./|docs/)", "](", markdown)
