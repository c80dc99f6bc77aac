"""Every command and every Python block of the pages runs; links lead somewhere; public names are documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import biasloss_ext
from biasloss_ext import functional, models
from biasloss_ext import nn as layers
from biasloss_ext.cli import main
from biasloss_ext.models import skipblocknet
from biasloss_ext.ops.native import native
from biasloss_ext.recipes.data import digits
from biasloss_ext.recipes.optional import why_not
from tests.recipes.idx_files import EMNIST_PARTS, write_idx
from tests.recipes.pictures import write_folder
from tests.recipes.tiny import write_cifar

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
OPTIONAL = ("timm", "torchvision", "lightning", "onnxscript", "onnxruntime", "openvino", "huggingface_hub")
SCRIPTS = {"distributed.md": "ddp.py"}  # pages whose Python block is a script that a command of the page runs
# The same commands on less: options given later win.
LESS = {
    "info": "",
    "train": "--epochs 1 --workers 0",
    "compare": "--epochs 1 --seeds 0 --workers 0",
    "diversity": "",
    "predict": "--workers 0",
    "data check": "",
    "data pack": "",
    "data speed": "--seconds 0.1 --workers 0",
    "export": "",
}
DATA_SAYS = {"check": "all 32 image files", "pack": "32 images of 2 classes", "speed": "data pipeline alone: "}


def blocks(page: Path, language: str) -> list[str]:
    """Each under as many empty lines as precede it in the page, so that a traceback names the line of the page."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def needs(text: str) -> str | None:
    """Why this cannot run here."""
    reasons = {package: why_not(package) for package in OPTIONAL}
    if any(name in text for name in ("torchvision", "mixup", "rand-augment", "random-erasing")):
        return reasons["torchvision"]
    if "torch.int8" in text and not native().build.get("cpu_int8"):
        return "this CPU or build has no int8 kernels"
    if "_pretrained" in text and reasons["huggingface_hub"]:
        return reasons["huggingface_hub"]
    if ("torch.onnx" in text or text.startswith("biasloss export")) and reasons["onnxscript"]:
        return reasons["onnxscript"]
    return next((reason for package, reason in reasons.items() if package in text and reason), None)


def with_this_package() -> dict[str, str]:
    """The environment in which processes elsewhere find the package that is tested here, installed or not."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of, and fewer digits."""
    for name, images in (("cifar10", 32), ("cifar100", 128)):
        write_cifar(tmp_path / "data", name, images)
    write_idx(tmp_path / "data" / "FashionMNIST" / "raw", train_images=128)
    letters = tuple(f"emnist-letters-{part}-ubyte" for part in EMNIST_PARTS)
    write_idx(tmp_path / "data" / "EMNIST", letters, train_images=600, classes=26, first_label=1, compressed=True)
    write_folder(tmp_path / "data" / "flowers", images=8)
    (tmp_path / "data" / "new").mkdir()
    for number in ("one", "two"):
        Image.new("RGB", (40, 30), (80, 80, 120)).save(tmp_path / "data" / "new" / f"{number}.png")
    original = digits.InMemoryData

    def few(train: object, test: object, **options: object) -> object:
        (images, classes), (test_images, test_classes) = train, test  # type: ignore[misc]
        return original((images[:128], classes[:128]), (test_images[:50], test_classes[:50]), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(digits, "InMemoryData", few)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit status of a command of this package."""
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def run_in_processes(words: list[str]) -> None:
    less = ["--epochs", "1"] if "train" in words else []
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *less]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_this_package())
    assert done.returncode == 0, done.stderr
    if less:
        assert done.stdout.count("test accuracy") == 2  # of the epoch, and the result: by one process


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if page.name in SCRIPTS:
        (script,) = blocks(page, "python")
        (place / SCRIPTS[page.name]).write_text(script)
    ran, skipped = 0, []
    for words in commands(page):
        if reason := needs(" ".join(words)):
            skipped.append(f"{' '.join(words)}: {reason}")
            continue
        ran += 1
        if words[0] == "torchrun":
            run_in_processes(words)
            continue
        assert words[0] == "biasloss", words
        less = LESS[" ".join(words[1:3]) if words[1] == "data" else words[1]] + (
            " --image-size 64 --batch-size 16" if {"imagefolder", "packed"} & {*words} else ""
        )
        status = run_here([*words, *shlex.split(less if "--help" not in words else "")], monkeypatch)
        assert status in (0, None), f"{' '.join(words)}: {capsys.readouterr().err}"
        if words[1] == "data":
            assert DATA_SAYS[words[2]] in capsys.readouterr().out
        elif words[1] != "info" and "--help" not in words:
            out = Path(words[words.index("--out") + 1]) if "--out" in words else Path("runs/train")
            written = Path(words[words.index("--csv") + 1]) if "--csv" in words else out / "report.md"
            written = out if words[1] == "export" else written
            assert written.stat().st_size > 0
    assert ran >= 2
    for line in skipped:
        print(f"not run: {line}")


WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page.name not in SCRIPTS]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other as a reader enters them."""
    if page.name == "training.md":
        run_here(["biasloss", "train", "--epochs", "1", "--out", "runs/again"], monkeypatch)
    if page.name == "deployment.md":  # fewer blocks: exporters take seconds for each
        monkeypatch.setattr(
            skipblocknet,
            "_GROUPS",
            [group[: 2 if group is skipblocknet._GROUPS[0] else 1] for group in skipblocknet._GROUPS],
        )
        run_here(["biasloss", "train", "--epochs", "1", "--out", "runs/digits"], monkeypatch)
        assert run_here(["biasloss", "export", "runs/digits", "--out", "digits.onnx"], monkeypatch) in (0, None)
    if page.name == "models.md":
        torch.save(models.skipblocknet_m().state_dict(), "skipblocknet-m.pth")
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        if reason := needs(block):
            print(f"not run: {reason}")
        else:
            exec(compile(block, page.name, "exec"), names)


def test_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, with fewer steps; committed without outputs."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    cells = json.loads((DOCS / "notebooks" / "digits.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    source = "\n\n".join("".join(cell["source"]) for cell in code)
    assert source.count("range(40)") == 1
    names: dict[str, Any] = {}
    try:
        exec(compile(source.replace("range(40)", "range(3)"), "digits.ipynb", "exec"), names)
        assert len(pyplot.get_fignums()) == 2
    finally:
        pyplot.close("all")
    assert torch.stack(names["weights_of_steps"]).shape == (3, 64)


def test_pages_have_no_other_commands() -> None:
    """Commands stand in blocks that the tests above find; blocks without a language install, or are files of other programs."""
    for page in PAGES:
        languages = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert set(languages) <= {"bash", "python", "bibtex", ""}, page.name
        assert languages.count("") >= len(languages) / 2


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in DOCS.glob("*.md") if f": {page.name}\n" not in navigation]
    assert not missing


def documented() -> dict[str, Any]:
    """The objects of the API reference, by the name that the page gives them."""
    found = {}
    for path in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE):
        module, _, name = path.rpartition(".")
        found[path] = getattr(importlib.import_module(module), name)
    return found


def parts(path: str, found: Any) -> Iterator[tuple[str, Any]]:
    """An object, and the methods and properties that a class of this package defines; not those that torch documents."""
    yield path, found
    if inspect.isclass(found):
        for name, member in vars(found).items():
            function = member.fget if isinstance(member, property) else member
            if not name.startswith("_") and inspect.isfunction(function) and not hasattr(nn.Module, name):
                yield f"{path}.{name}", function


def test_public_names_are_in_the_reference() -> None:
    public = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (biasloss_ext, functional, layers, models)
        for name in module.__all__
        if name not in ("__version__", "functional")
    }
    known = list(documented().values())
    assert not [name for name, found in public.items() if not any(found is other for other in known)]


@pytest.mark.parametrize("path", documented())
def test_public_names_have_docstrings(path: str) -> None:
    found = documented()[path]
    assert not [name for name, part in parts(path, found) if not (part.__doc__ or "").strip()]
    assert not found.__doc__.startswith(f"{found.__name__}("), "a dataclass has a generated one"


def texts(path: Path) -> Iterator[str]:
    """The strings of a source file, with a mark for what an f-string fills in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_errors_of_troubleshooting_exist() -> None:
    sources = [ROOT / "setup.py", ROOT / "build_choices.py", *(ROOT / "biasloss_ext").rglob("*.py")]
    said = "\n".join(text for path in sources for text in texts(path))
    messages = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        for fragment in message.split("..."):
            assert fragment.strip() in said, message
