"""Choice of backends, and an installation whose compiled kernels are missing, broken, or of an older CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import biasloss_ext
from biasloss_ext.info import report
from biasloss_ext.ops import FAMILIES, backends
from biasloss_ext.ops.native import BUILD_HINT, _remedy, covers, native
from tests.runnable import assert_tests_pass_on, other_variants, variant_in_use

PACKAGE = Path(biasloss_ext.__file__).parent


def run_python(code: str, package_parent: Path, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(package_parent), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=package_parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def copy_without_kernels(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "biasloss_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


LOSS = """
import torch, biasloss_ext
torch.manual_seed(0)
loss_fn = biasloss_ext.FusedBiasLoss()
output = torch.randn(8, 100, requires_grad=True)
loss = loss_fn(torch.randn(8, 3, 40, 40), output, torch.arange(8))
loss.backward()
print("loss", loss.item(), output.grad.square().sum().item())
try:
    biasloss_ext.FusedBiasLoss(backend="cpu")(torch.randn(2, 3), torch.randn(2, 4), torch.arange(2))
except RuntimeError as error:
    print("error", error)
"""


def numbers(text: str) -> list[float]:
    return [float(word) for word in next(line for line in text.splitlines() if line.startswith("loss")).split()[1:]]


def test_missing_kernels_warn_once_and_fall_back(tmp_path: Path) -> None:
    text = run_python(LOSS, copy_without_kernels(tmp_path))
    assert text.count("falls back to plain PyTorch: the compiled kernels are not built; reinstall with") == 1
    assert "error backend 'cpu' cannot run here: the compiled kernels are not built" in text
    assert numbers(text) == pytest.approx(numbers(run_python(LOSS, PACKAGE.parent)), rel=1e-5)


def test_broken_kernels_tell_their_cause(tmp_path: Path) -> None:
    parent = copy_without_kernels(tmp_path)
    (parent / "biasloss_ext" / "_ops.so").write_bytes(b"not a library")
    text = run_python(LOSS, parent)
    assert text.count("RuntimeWarning: biasloss_ext falls back") == 1
    assert f"do not load under torch {torch.__version__}" in text
    assert "error backend 'cpu' cannot run here: the compiled kernels do not load" in text


@pytest.mark.skipif(not other_variants(), reason="this build has the portable instruction set alone")
def test_every_cpu_variant_gives_the_same_loss() -> None:
    best = variant_in_use()
    show = LOSS + "from biasloss_ext.ops.native import native; print(native().build['cpu_variant_in_use'])"
    results = {}
    for name in (*other_variants(), best):
        text = run_python(show, PACKAGE.parent, BIASLOSS_CPU_ISA=name)
        results[text.split()[-1]] = numbers(text)
    assert "baseline" in results
    assert best in results
    for values in results.values():
        assert values == pytest.approx(results["baseline"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("variant", other_variants())
def test_accuracy_of_the_other_cpu_variants(variant: str) -> None:
    tests = Path(__file__).parent / "ops"
    names = ("bias_loss", "feature_variance", "bias_loss_edge_cases", "batch_norm", "pool_variance", "squeeze_excite")
    assert_tests_pass_on(variant, "cpu", *(tests / f"test_{name}.py" for name in names))


def test_choice() -> None:
    cpu = torch.device("cpu")
    assert backends.choose("auto", cpu) == "cpu"
    assert backends.choose("reference", cpu) == "reference"
    assert backends.choose("auto", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match="unknown backend 'fast'; there are: auto, reference, cpu, cuda, triton"):
        backends.choose("fast", cpu)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: it runs on CUDA tensors, not on cpu"):
        backends.choose("cuda", cpu)
    if torch.version.cuda is None:
        with pytest.raises(RuntimeError, match=r"'triton' cannot run here: torch .* is built without CUDA"):
            backends.choose("triton", torch.device("cuda"))


def test_architectures_that_serve_a_gpu() -> None:
    built = ("7.5", "8.0", "9.0", "12.0+PTX")
    assert covers(built, (8, 0))
    assert covers(built, (8, 9))  # machine code of the same major version
    assert covers(built, (12, 1))
    assert covers(built, (13, 0))  # PTX
    assert not covers(built, (7, 0))
    assert not covers(built, (10, 0))
    assert not covers((), (9, 0))
    assert covers(("9.0a",), (9, 0))  # that one alone
    assert not covers(("9.0a", "10.0a+PTX"), (10, 3))
    assert covers(("10.0f",), (10, 3))  # the family
    assert not covers(("10.0f+PTX",), (12, 0))


def test_a_source_folder_that_hides_an_installed_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, site = tmp_path / "source" / "biasloss_ext", tmp_path / "site" / "biasloss_ext"
    for folder in (source, site):
        folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["", str(source.parent), str(site.parent)])
    monkeypatch.chdir(source.parent)
    assert _remedy(source) == BUILD_HINT
    (site / "_ops.so").touch()
    sentence = f"{source} hides the package installed in {site}: run from another folder than {source.parent}"
    assert _remedy(source) == sentence
    (source / "_ops.so").touch()  # which does not load
    assert _remedy(source) == sentence
    monkeypatch.setattr(sys, "path", [str(source.parent)])
    assert _remedy(source) == BUILD_HINT


def test_info_names_every_op_and_backend() -> None:
    text = report()
    for word in (*FAMILIES, *backends.BACKENDS, torch.__version__, native().build["cpu_variant_in_use"]):
        assert word in text
    assert "no: it runs on CUDA tensors, not on cpu" in text


def test_import_is_light() -> None:
    """Neither Dynamo, Triton, nor the tools of training come with the import."""
    heavy = run_python(
        "import torch, sys; before = set(sys.modules); import biasloss_ext;"
        "print([m for m in ('torch._dynamo', 'triton', 'matplotlib', 'sklearn', 'typer', 'timm')"
        " if m in set(sys.modules) - before])",
        PACKAGE.parent,
    )
    assert heavy.strip() == "[]"
