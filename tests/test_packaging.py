"""The source distribution builds, what is installed has types, and a build says what it needs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

import biasloss_ext
import build_choices
from biasloss_ext.version import __version__

ROOT = Path(__file__).parent.parent
UNSET = ("PYTHONPATH", "CUDA_HOME", "NVCC", "TORCH_CUDA_ARCH_LIST")


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key not in UNSET}
    return subprocess.run(
        command, cwd=cwd, env={**variables, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def test_the_source_distribution_has_all_that_a_build_reads(source: Path) -> None:
    """`make wheel` builds the wheel from it, and `make test-abi` runs the tests on what is installed."""
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    for folder, patterns in (("csrc", ("*",)), ("biasloss_ext", ("*.py", "py.typed"))):
        files = {
            str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / folder).rglob(pattern) if p.is_file()
        }
        assert files <= names, files - names
    assert {"setup.py", "build_choices.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_one_wheel_for_every_python(decide: dict[str, Any]) -> None:
    """`make test-wheel` installs it beside the oldest and the newest Python and torch."""
    command = decide["BuildWheel"](setuptools.Distribution({"ext_modules": [setuptools.Extension("library", [])]}))
    command.ensure_finalized()
    python, abi, _ = command.get_tag()
    assert (python, abi) == ("py3", "none")
    library = Path(biasloss_ext.__file__).parent / "_ops.so"
    if not library.exists():
        pytest.skip("the compiled kernels are not built")
    of_python = re.findall(rb"\b(?:PyInit_|PyObject_|Py_IncRef|libpython)\w*", library.read_bytes())
    assert not of_python, "a library that calls Python serves one Python alone"


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


USER = """
import torch
from torch import nn

from biasloss_ext import FeatureTap, FusedBiasLoss, accelerate, bias_weight, feature_variance, functional
from biasloss_ext import optimize_for_inference
from biasloss_ext.models import SkipblockNet, skipblocknet_xs
from biasloss_ext.nn import DepthwiseConv2d

loss_fn = FusedBiasLoss(alpha=0.3, normalisation_mode="local")
features, output = FeatureTap(nn.Sequential(nn.Conv2d(3, 8, 3)), "0")(torch.zeros(2, 3, 8, 8))
weights: torch.Tensor = bias_weight(feature_variance(features), alpha=0.3)
loss: torch.Tensor = functional.bias_loss(features, output, torch.zeros(2)).loss
model: SkipblockNet = skipblocknet_xs(num_classes=10, return_features="variance", fused=False)
fused: int = accelerate(model).count("depthwise convolution").fused
scorer: nn.Module = optimize_for_inference(model)
conv = DepthwiseConv2d(8, 8, 3, padding=1, groups=8)

FusedBiasLoss(alpha="much")  # type: ignore[arg-type]
bias_weight(weights, gamma=1)  # type: ignore[call-arg]
skipblocknet_xs(return_features="maps")  # type: ignore[arg-type]
accelerate(model).layers[0].price  # type: ignore[attr-defined]
"""
# torch is skipped, which takes half a minute to read.
STRICT = "[mypy]\nstrict = True\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n"


def test_a_user_s_file_is_checked_by_the_types_of_the_installed_package(tmp_path: Path) -> None:
    """``mypy --strict`` finds no error in it but those that it expects: without py.typed it would find none of these."""
    pytest.importorskip("mypy")
    run(sys.executable, "-m", "venv", "--without-pip", "user", cwd=tmp_path)
    (packages,) = (tmp_path / "user" / "lib").glob("*/site-packages")
    (packages / "others.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("-packages")))
    # What a wheel has beside the compiled kernels.
    installed = run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(packages), cwd=ROOT)
    assert installed.returncode == 0, installed.stderr
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(STRICT)
    python = tmp_path / "user" / "bin" / "python"
    done = run(sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def fake_nvcc(folder: Path, release: str, architectures: str = "compute_80\\ncompute_90\\n") -> str:
    path = folder / "nvcc"
    path.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f"--list-gpu-arch) printf '{architectures}';;\nesac\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of the user decides, and torch is built without CUDA."""
    for name in (*UNSET, "BIASLOSS_CUDA", "BIASLOSS_CPU_VARIANTS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.version.cuda", None)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"BIASLOSS_CUDA": "0"}, "no CUDA kernels: BIASLOSS_CUDA=0"),
        ({"BIASLOSS_CUDA": "yes"}, "BIASLOSS_CUDA must be 0 or 1, got 'yes'"),
        ({"BIASLOSS_CUDA": "1", "PATH": "/nowhere", "MISSING": "1"}, "BIASLOSS_CUDA=1, but nvcc is not found: set"),
        ({"FAKE": "11.8"}, "is CUDA 11.8, but 12.0 or newer is needed: set CUDA_HOME to a newer toolkit"),
        ({"FAKE": "13.1"}, "('8.0', '9.0+PTX')"),
        ({"FAKE": "13.1", "TORCH_CUDA_ARCH_LIST": "9.0 8.0+PTX"}, "('9.0', '8.0+PTX')"),
        ({"FAKE": "13.1", "TORCH_CUDA_ARCH_LIST": "9.0;5.2"}, "asks for '5.2'"),
    ],
)
def test_decisions_about_cuda(
    environment: dict[str, str],
    said: str,
    tmp_path: Path,
    bare: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        bare.setenv(name, value)
    if "FAKE" in environment:
        bare.setenv("NVCC", fake_nvcc(tmp_path, environment["FAKE"]))
    if "MISSING" in environment:
        bare.setattr(build_choices, "find_nvcc", lambda: None)
    try:
        found = build_choices.find_cuda()
        text = str(found and found.architectures)
    except SystemExit as error:
        text = str(error)
    assert said in text + capsys.readouterr().err


@pytest.fixture(scope="module")
def decide() -> dict[str, Any]:
    """The functions of setup.py, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", ("8.0", "9.0+PTX")),
        (" ; ", ("8.0", "9.0+PTX")),
        ("9.0a", ("9.0a",)),
        ("9.0a+PTX;8.0", ("9.0a+PTX", "8.0")),
        ("10.0f", ("10.0f",)),
        ("9.0,8.0", ("9.0", "8.0")),
        ("Hopper", ("9.0+PTX",)),
        ("Hopper 9.0+PTX", ("9.0+PTX",)),
        ("common", ("8.0", "9.0+PTX")),
        ("native", ("8.0", "9.0+PTX")),  # no GPU here
        ("Volta", "asks for 'Volta', .* knows 8.0, 9.0, 10.0, and the names Turing, Ampere"),
        ("9.0b", "asks for '9.0b'"),
        ("90", "asks for '90'"),
        ("sm_90", "asks for 'sm_90'"),
    ],
)
def test_architectures_as_torch_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, expected: Any
) -> None:
    nvcc = fake_nvcc(tmp_path, "13.1", "compute_80\\ncompute_90\\ncompute_100\\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(build_choices, "DEFAULT_ARCHITECTURES", ("7.5", "8.0", "9.0"))
    if isinstance(expected, tuple):
        assert build_choices.architectures(nvcc) == expected
        return
    with pytest.raises(SystemExit, match=f"biasloss_ext: TORCH_CUDA_ARCH_LIST {expected}"):
        build_choices.architectures(nvcc)


def test_a_build_for_development_has_one_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path, "13.1", "compute_75\\ncompute_80\\ncompute_90\\n")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert build_choices.architectures(nvcc, development=True) == ("7.5+PTX",)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    assert build_choices.architectures(nvcc, development=True) == ("9.0",)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build_choices.architectures(nvcc, development=True) == ("8.0",)


@pytest.mark.parametrize(
    ("asked", "development", "capability", "expected"),
    [
        (None, False, "AVX2", ["baseline", "avx2", "avx512"]),
        (None, True, "AVX2", ["baseline", "avx2"]),
        (None, True, "AVX512", ["baseline", "avx512"]),
        (None, True, "DEFAULT", ["baseline"]),
        ("all", True, "AVX2", ["baseline", "avx2", "avx512"]),
        ("native", False, "AVX512", ["baseline", "avx512"]),
    ],
)
def test_instruction_sets_that_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    development: bool,
    capability: str,
    expected: list[str],
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.delenv("BIASLOSS_CPU_VARIANTS", raising=False)
    if asked is not None:
        monkeypatch.setenv("BIASLOSS_CPU_VARIANTS", asked)
    assert list(build_choices.cpu_variants(development)) == expected


def test_unknown_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("BIASLOSS_CPU_VARIANTS", "avx10")
    with pytest.raises(SystemExit, match="BIASLOSS_CPU_VARIANTS must be all or native, got 'avx10'"):
        build_choices.cpu_variants(True)


def test_flags_of_architectures() -> None:
    flags = build_choices.Cuda("nvcc", (13, 1), ("9.0a", "10.0f+PTX")).flags()
    assert flags == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100f,code=sm_100f",
        "-gencode=arch=compute_100f,code=compute_100f",
    ]


def test_jobs_and_flags_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    default = build_choices.jobs()
    for asked, jobs in (("", default), (" ", default), ("3", 3), (" 4 ", 4)):
        monkeypatch.setenv("MAX_JOBS", asked)
        assert build_choices.jobs() == jobs
    for asked in ("many", "0", "-2", "1.5"):
        monkeypatch.setenv("MAX_JOBS", asked)
        with pytest.raises(SystemExit, match="MAX_JOBS must be a number from 1 on, got "):
            build_choices.jobs()
    monkeypatch.setenv("CXX", "ccache g++")
    assert build_choices.words("CXX") == ["ccache", "g++"]
    monkeypatch.setenv("CXXFLAGS", "-DNAME='half")
    with pytest.raises(SystemExit, match=r"CXXFLAGS cannot be read \(No closing quotation\), got"):
        build_choices.words("CXXFLAGS")


def test_the_cache_of_files_is_available_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24684220 kB\nMemFree:          410000 kB\nMemAvailable:   21850000 kB\n")
    assert build_choices.available_memory(meminfo) == 21850000 * 1024
    assert build_choices.available_memory(tmp_path / "absent") > 0


def test_compilers_that_fail_are_one_sentence(decide: dict[str, Any], tmp_path: Path) -> None:
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho first >&2\necho 'no license' >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(
        SystemExit, match=r"nvcc --version failed with exit code 3 \(no license\); set CXX or NVCC to a"
    ):
        build_choices.nvcc_version(str(failing))
    with pytest.raises(SystemExit, match=r"nvcc --list-gpu-arch failed with exit code 3"):
        build_choices.architectures(str(failing))
    with pytest.raises(SystemExit, match=r"cannot run .*/none: No such file or directory; set CXX or NVCC"):
        build_choices.output_of(str(tmp_path / "none"), "--version")
    failing.write_text("not a program")
    with pytest.raises(SystemExit, match=r"cannot run .*/nvcc: Exec format error"):
        build_choices.nvcc_version(str(failing))
    build = decide["Build"](setuptools.Distribution())
    build.build_temp, build.build_lib, build.inplace = str(tmp_path / "temp"), str(tmp_path / "lib"), False
    build.cuda, build.x86, build.cxx = None, True, [str(failing)]
    build.write_ops = lambda writer, folder, out: writer.rule("cxx", "false") or writer.build("all", "cxx")
    with pytest.raises(SystemExit, match=r"compiling biasloss_ext\._ops failed, see above; BIASLOSS_CUDA=0 builds"):
        build.build_extension(setuptools.Extension("biasloss_ext._ops", []))


def test_another_cuda_major_than_torch_s_is_an_error(
    tmp_path: Path, bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.setenv("NVCC", fake_nvcc(tmp_path, "13.1"))
    bare.setattr("torch.version.cuda", "12.8")
    with pytest.raises(
        SystemExit, match=r"is built for CUDA 12\.8: set CUDA_HOME to a CUDA 12 toolkit, or BIASLOSS_CUDA=0"
    ):
        build_choices.find_cuda()
    bare.setattr("torch.version.cuda", "13.0")
    assert build_choices.find_cuda() is not None
    assert "warning: nvcc is CUDA 13.1, torch is built for 13.0" in capsys.readouterr().err


def test_without_torch_the_build_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "install torch first, then pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr


def test_jobs_are_limited_by_memory_and_by_max_jobs(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(build_choices, "available_memory", lambda: 7 << 30)
    bare.setattr("os.sched_getaffinity", lambda _: range(64))
    assert build_choices.jobs() == 2
    bare.setenv("MAX_JOBS", "5")
    assert build_choices.jobs() == 5


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (("baseline",), []),
        (("baseline", "avx2"), ["avx2"]),
        (("baseline", "avx512"), ["avx2", "avx512vnni"]),
        (("baseline", "avx2", "avx512"), ["avx2", "avx512vnni"]),
    ],
)
def test_instruction_sets_of_the_kernels_on_bytes(variants: tuple[str, ...], expected: list[str]) -> None:
    assert list(build_choices.int8_variants(variants)) == expected
