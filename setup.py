"""Builds the kernels. What is built, and why, is printed; see docs/getting-started.md for the options."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import include_paths
except ImportError:
    sys.exit(
        "biasloss_ext builds beside the torch you run: install torch first, then pip install --no-build-isolation ."
    )

OLDEST_TORCH = (2, 11)
OLDEST_CUDA = (12, 0)
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
# The stable ABI of this torch and everything newer: one build serves them all.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
X86_VARIANTS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
SIMD_FLAGS = ["-ffp-contract=fast", "-fno-math-errno"]
BYTES_PER_JOB = 3 << 30  # nvcc, while it compiles for all architectures

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"


# What torch calls architectures in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHITECTURES = {
    "Turing": ("7.5+PTX",),
    "Ampere": ("8.0", "8.6+PTX"),
    "Ampere+Tegra": ("8.7",),
    "Ada": ("8.9+PTX",),
    "Hopper": ("9.0+PTX",),
    "Blackwell+Tegra": ("11.0",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1+PTX"),
}


def say(text: str) -> None:
    print(f"biasloss_ext: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: tuple[int, int]
    architectures: tuple[str, ...]  # "9.0", "12.0+PTX"

    def flags(self) -> list[str]:
        flags = []
        for name in self.architectures:
            number = name.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if name.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def output_of(*command: str) -> str:
    """What a compiler says of itself; exits with one sentence where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        sys.exit(f"biasloss_ext: cannot run {command[0]}: {error.strerror}; set CXX or NVCC to a compiler that runs")
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()
        sys.exit(
            f"biasloss_ext: {shlex.join(command)} failed with exit code {error.returncode}"
            f"{f' ({said[-1]})' if said else ''}; set CXX or NVCC to a compiler that works, or BIASLOSS_CUDA=0 to build"
            " without CUDA kernels"
        )


def words(variable: str) -> list[str]:
    """The words of an environment variable, as a shell reads them."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        sys.exit(f"biasloss_ext: {variable} cannot be read ({error}), got {os.environ[variable]!r}")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def find_cuda(development: bool = False) -> Cuda | None:
    """The CUDA compiler to build with, or None; exits with one sentence where CUDA is asked for and cannot be had."""
    asked = os.environ.get("BIASLOSS_CUDA")
    if asked not in (None, "", "0", "1"):
        sys.exit(f"biasloss_ext: BIASLOSS_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        say("no CUDA kernels: BIASLOSS_CUDA=0")
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if asked == "1":
            sys.exit("biasloss_ext: BIASLOSS_CUDA=1, but nvcc is not found: set CUDA_HOME, or NVCC to its path")
        say("no CUDA kernels: nvcc is not found (set CUDA_HOME to build them); Triton will serve GPUs")
        return None
    version = nvcc_version(nvcc)
    if version < OLDEST_CUDA:
        sys.exit(
            f"biasloss_ext: {nvcc} is CUDA {version[0]}.{version[1]}, needed is {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or"
            " newer: set CUDA_HOME to a newer toolkit, or BIASLOSS_CUDA=0 to build without CUDA kernels"
        )
    check_against_torch(version)
    return Cuda(nvcc, version, architectures(nvcc, development))


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = output_of(nvcc, "--version")
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        sys.exit(f"biasloss_ext: {nvcc} --version tells no release: set NVCC to the CUDA compiler")
    return int(found[1]), int(found[2])


def check_against_torch(version: tuple[int, int]) -> None:
    if torch.version.cuda is None:
        return
    major, minor = (int(part) for part in torch.version.cuda.split(".")[:2])
    if major != version[0]:
        sys.exit(
            f"biasloss_ext: nvcc is CUDA {version[0]}.{version[1]}, torch {torch.__version__} is built for CUDA"
            f" {torch.version.cuda}: set CUDA_HOME to a CUDA {major} toolkit, or BIASLOSS_CUDA=0 to build without CUDA"
            " kernels"
        )
    if minor != version[1]:
        say(
            f"warning: nvcc is CUDA {version[0]}.{version[1]}, torch is built for {torch.version.cuda};"
            " this should work"
        )


def architectures(nvcc: str, development: bool = False) -> tuple[str, ...]:
    """Those asked for; by default what is in use, or in a build for development those of the GPUs here, or the oldest with code
    that any newer GPU can compile for itself."""
    text = output_of(nvcc, "--list-gpu-arch")
    known = {f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", text)}
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if asked == ["native"] or (not asked and development and torch.cuda.is_available()):
        count = torch.cuda.device_count()
        asked = sorted({".".join(map(str, torch.cuda.get_device_capability(index))) for index in range(count)})
    if not asked or asked in (["common"], ["All"]):
        defaults = [name for name in DEFAULT_ARCHITECTURES if name in known]
        if not defaults:
            sys.exit(f"biasloss_ext: {nvcc} knows none of {', '.join(DEFAULT_ARCHITECTURES)}: set NVCC to another one")
        defaults = defaults[:1] if development else defaults
        return (*defaults[:-1], f"{defaults[-1]}+PTX")
    names = [name for entry in asked for name in NAMED_ARCHITECTURES.get(entry, (entry,))]
    for name in names:
        # The letters of 9.0a and 10.0f let a compiler use what later architectures lack.
        if re.sub(r"[af]?(\+PTX)?$", "", name) not in known:
            sys.exit(
                f"biasloss_ext: TORCH_CUDA_ARCH_LIST asks for {name!r},"
                f" {nvcc} knows {', '.join(sorted(known, key=float))}, and the names"
                f" {', '.join(NAMED_ARCHITECTURES)}"
            )
    return tuple(dict.fromkeys(names))


def cpu_variants(development: bool) -> dict[str, list[str]]:
    """The instruction sets to compile the CPU kernels for, with the compiler's flags: all, or in a build for development the
    portable one and the best of this machine."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": []}
    asked = os.environ.get("BIASLOSS_CPU_VARIANTS", "native" if development else "all")
    if asked not in ("all", "native"):
        sys.exit(f"biasloss_ext: BIASLOSS_CPU_VARIANTS must be all or native, got {asked!r}")
    variants = {"baseline": [], **X86_VARIANTS}
    if asked == "native":
        capability = torch.backends.cpu.get_cpu_capability().lower()
        best = next((name for name in ("avx512", "avx2") if capability.startswith(name)), "baseline")
        variants = {name: flags for name, flags in variants.items() if name in ("baseline", best)}
    return variants


def jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "").strip()
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            sys.exit(f"biasloss_ext: MAX_JOBS must be a number from 1 on, got {asked!r}")
        return int(asked)
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB))


class Build(build_ext):
    """Both libraries through one ninja file each: parallel, and only what changed."""

    def run(self) -> None:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
            sys.exit(f"biasloss_ext needs torch 2.11 or newer, this is {torch.__version__}: upgrade torch first")
        development = bool(self.inplace or self.editable_mode)
        self.cuda = find_cuda(development)
        self.cxx = words("CXX") or ["c++"]  # perhaps "ccache g++"
        say(f"torch {torch.__version__} (stable ABI of 2.11), {shlex.join(self.cxx)}, {jobs()} jobs")
        self.variants = cpu_variants(development)
        say(f"CPU kernels: {', '.join(self.variants)}{', chosen at run time' if len(self.variants) > 1 else ''}")
        if self.cuda is not None:
            major, minor = self.cuda.version
            say(f"CUDA kernels: {', '.join(self.cuda.architectures)}, by {self.cuda.nvcc} ({major}.{minor})")
        super().run()

    def get_ext_filename(self, name: str) -> str:
        # _ops.so holds no Python: torch loads it, by this plain name.
        return f"{name.replace('.', '/')}.so" if name.endswith("_ops") else super().get_ext_filename(name)

    def build_extension(self, extension: Extension) -> None:
        from ninja import ninja_syntax

        folder = Path(self.build_temp).resolve() / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(extension.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=10_000)
            if extension.name.endswith("_ops"):
                self.write_ops(writer, folder, out)
            else:
                self.write_module(writer, folder, out)
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), f"-j{jobs()}"], check=False)
        if done.returncode:
            sys.exit(
                f"biasloss_ext: compiling {extension.name} failed, see above; BIASLOSS_CUDA=0 builds without CUDA kernels,"
                " MAX_JOBS=1 takes less memory"
            )

    def host_flags(self) -> list[str]:
        flags = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi"]
        return [*flags, *words("CXXFLAGS"), *self.variant_flags()]

    def variant_flags(self) -> list[str]:
        return [f"-DBIASLOSS_WITH_{name.upper()}" for name in self.variants if name != "baseline"]

    def write_rules(
        self, writer: object, cxx_flags: list[str], nvcc_flags: list[str], linker: list[str], libraries: list[str]
    ) -> None:
        writer.rule(
            "cxx",
            shlex.join([*self.cxx, *cxx_flags]) + " $flags -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $in $flags",
        )
        if self.cuda is not None:
            writer.rule(
                "nvcc",
                shlex.join([self.cuda.nvcc, *nvcc_flags]) + " -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $in",
            )
        writer.rule("link", f"{shlex.join(linker)} -shared -o $out $in {shlex.join(libraries)}")

    def write_ops(self, writer: object, folder: Path, out: Path) -> None:
        includes = [f"-I{path}" for path in include_paths("cpu")]
        with_cuda = ["-DBIASLOSS_WITH_CUDA"] if self.cuda is not None else []
        common = [*STABLE_ABI, *includes, *with_cuda]
        library = Path(torch.__file__).parent / "lib"
        linker, libraries = self.cxx, [f"-L{library}", "-ltorch_cpu", "-s"]
        nvcc_flags: list[str] = []
        if self.cuda is not None:
            host = ["-ccbin", self.cxx[-1]] if words("CXX") else []
            nvcc_flags = ["-O3", "-std=c++20", *host, "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]
            nvcc_flags += [*self.cuda.flags(), *common]
            linker = [self.cuda.nvcc]
            libraries = [*host, "-cudart", "static", *libraries[:-1], "-Xlinker", "-s"]
        self.write_rules(writer, [*self.host_flags(), *common], nvcc_flags, linker, libraries)

        objects = []
        for source in sorted(CSRC.rglob("*.c*")):
            relative = source.relative_to(CSRC)
            target = str(folder / relative.with_suffix(".o")).replace(".o", f"_{source.suffix[1:]}.o")
            if source.name == "module.cpp":
                continue
            if source.suffix == ".cu" and self.cuda is not None:
                objects += writer.build(target, "nvcc", str(source.resolve()))
            elif source.name.endswith("_simd.cpp"):
                for name, flags in self.variants.items():
                    all_flags = [f"-DBIASLOSS_ISA={name}", *SIMD_FLAGS, *flags]
                    objects += writer.build(
                        target.replace(".o", f"_{name}.o"),
                        "cxx",
                        str(source.resolve()),
                        variables={"flags": shlex.join(all_flags)},
                    )
            elif source.name.endswith("_vnni.cpp"):
                if "avx512" in self.variants:
                    vnni_flags = ["-DBIASLOSS_ISA=avx512vnni", *SIMD_FLAGS, *self.variants["avx512"], "-mavx512vnni"]
                    objects += writer.build(
                        target, "cxx", str(source.resolve()), variables={"flags": shlex.join(vnni_flags)}
                    )
            elif source.suffix == ".cpp":
                objects += writer.build(target, "cxx", str(source.resolve()))
        writer.build(str(out), "link", objects)

    def write_module(self, writer: object, folder: Path, out: Path) -> None:
        import sysconfig

        import pybind11

        compiler = output_of(*self.cxx, "--version")
        facts = {
            "VERSION": self.distribution.get_version(),
            "BUILT_WITH_TORCH": torch.__version__,
            "COMPILER": compiler.splitlines()[0],
            "CPU_VARIANTS": ";".join(self.variants),
            "CUDA_VERSION": "" if self.cuda is None else ".".join(map(str, self.cuda.version)),
            "CUDA_ARCHITECTURES": "" if self.cuda is None else ";".join(self.cuda.architectures),
        }
        flags = [f'-DBIASLOSS_{name}="{value}"' for name, value in facts.items()]
        flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        cxx_flags = [flag.replace("$", "$$") for flag in [*self.host_flags(), *flags]]
        self.write_rules(writer, cxx_flags, [], self.cxx, ["-s"])
        objects = []
        for name in ("module.cpp", "simd/isa.cpp"):
            target = folder / Path(name).with_suffix(".o").name
            objects += writer.build(str(target), "cxx", str((CSRC / name).resolve()))
        writer.build(str(out), "link", objects)


setup(
    ext_modules=[
        Extension("biasloss_ext._ops", [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.cpp"))]),
        Extension("biasloss_ext._C", ["csrc/module.cpp"]),
    ],
    cmdclass={"build_ext": Build},
)
