"""Every command and every example of the pages on training, own models, diversity and fused blocks runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from biasloss_ext.cli import main
from biasloss_ext.recipes.data import digits
from biasloss_ext.recipes.optional import why_not
from tests.recipes.idx_files import EMNIST_PARTS, write_idx
from tests.recipes.pictures import write_folder
from tests.recipes.tiny import write_cifar

DOCS = Path(__file__).parent.parent / "docs"
OPTIONAL = ("timm", "torchvision", "lightning")
# The same commands on less: options given later win.
LESS = {
    "train": "--epochs 1 --workers 0",
    "compare": "--epochs 1 --seeds 0 --workers 0",
    "diversity": "",
    "predict": "--workers 0",
    "data": "",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def needs(text: str) -> str | None:
    """Why this cannot run here."""
    reasons = {package: why_not(package) for package in OPTIONAL}
    if any(name in text for name in ("torchvision", "mixup", "rand-augment", "random-erasing")):
        return reasons["torchvision"]
    return next((reason for package, reason in reasons.items() if package in text and reason), None)


def with_this_package() -> dict[str, str]:
    """The environment in which processes elsewhere find the package that is tested here, installed or not."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(DOCS.parent), os.environ.get("PYTHONPATH", "")))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the pages speak of, and fewer digits."""
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


@pytest.mark.slow
@pytest.mark.parametrize("page", ["training.md", "diversity.md"])
def test_commands(page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran, skipped = 0, []
    for words in commands(page):
        if reason := needs(" ".join(words)):
            skipped.append(f"{' '.join(words)}: {reason}")
            continue
        ran += 1
        if words[0] == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--epochs", "1"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_this_package())
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("test accuracy") == 2  # of the epoch, and the result: by one process
            continue
        assert words[0] == "biasloss", words
        less = LESS[words[1]] + (" --image-size 64 --batch-size 16" if "imagefolder" in words else "")
        monkeypatch.setattr("sys.argv", [*words, *shlex.split(less if "--help" not in words else "")])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None), f"{' '.join(words)}: {capsys.readouterr().err}"
        if words[1] == "data":
            assert "all 32 image files" in capsys.readouterr().out
        elif "--help" not in words:
            out = Path(words[words.index("--out") + 1]) if "--out" in words else Path("runs/train")
            written = Path(words[words.index("--csv") + 1]) if "--csv" in words else out / "report.md"
            assert written.stat().st_size > 0
    assert ran >= 5
    for line in skipped:
        print(f"not run: {line}")


def test_python_of_diversity(place: Path) -> None:
    for block in blocks("diversity.md", "python"):
        exec(compile(block, "diversity.md", "exec"), {})
    assert (place / "diversity.png").stat().st_size > 1000


def test_python_of_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["biasloss", "train", "--epochs", "1", "--out", "runs/again"])
    with pytest.raises(SystemExit):
        main()
    (block,) = blocks("training.md", "python")
    names: dict[str, object] = {}
    exec(compile(block, "training.md", "exec"), names)
    assert not names["model"].training  # type: ignore[attr-defined]


FUSED = [(page, block) for page in ("fused-blocks.md", "accelerate.md") for block in blocks(page, "python")]


@pytest.mark.parametrize("number", range(len(FUSED)))
def test_python_of_fused_blocks(number: int) -> None:
    page, block = FUSED[number]
    if reason := needs(block):
        pytest.skip(reason)
    exec(compile(block, page, "exec"), {})


def _own_model_blocks() -> list[str]:
    return blocks("your-own-model.md", "python")


@pytest.mark.parametrize("number", range(len(_own_model_blocks())))
def test_python_of_your_own_model(number: int, place: Path) -> None:
    """Each block after the first lines of the page, and after the loop by hand whose model the later ones use."""
    found = _own_model_blocks()
    if reason := needs(found[number]):
        pytest.skip(reason)
    by_hand = next(index for index, block in enumerate(found) if "class Net" in block)
    names: dict[str, object] = {}
    for index in sorted({0, number} | ({by_hand} if number > by_hand else set())):
        exec(compile(found[index], "your-own-model.md", "exec"), names)


def test_pages_have_no_other_commands() -> None:
    """Commands stand in blocks that the tests above find."""
    for page in ("training.md", "diversity.md", "your-own-model.md"):
        languages = re.findall(r"^```(\w*)$", (DOCS / page).read_text(), re.MULTILINE)
        assert set(languages) <= {"bash", "python", ""}
        assert languages.count("") == len(languages) / 2
