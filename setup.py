"""Builds the kernels. What is built, and why, is printed; see docs/getting-started.md for the options."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import include_paths
except ImportError:
    sys.exit(
        "biasloss_ext builds against the torch you run: install torch first, then pip install --no-build-isolation ."
    )

sys.path.insert(0, str(Path(__file__).parent))  # which a build in isolation leaves out

from build_choices import cpu_variants, find_cuda, int8_variants, jobs, output_of, say, words

OLDEST_TORCH = (2, 11)
# The stable ABI of this torch and everything newer: one build serves them all.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


class Build(build_ext):
    """The library through ninja: parallel, and only what changed."""

    def run(self) -> None:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
            sys.exit(f"biasloss_ext needs torch 2.11 or newer, this is {torch.__version__}: upgrade torch first")
        self.development = development = bool(self.inplace or self.editable_mode)
        if development:  # one folder for `build_ext --inplace` and `pip install -e`: only what changed is compiled
            self.build_temp = str(ROOT / "build" / "development")
        self.cuda = find_cuda(development)
        self.cxx = words("CXX") or ["c++"]  # perhaps "ccache g++"
        say(f"torch {torch.__version__} (stable ABI of 2.11), {shlex.join(self.cxx)}, {jobs()} jobs")
        self.variants = cpu_variants(development)
        self.int8_variants = int8_variants(self.variants)
        say(f"CPU kernels: {', '.join(self.variants)}{', chosen at run time' if len(self.variants) > 1 else ''}")
        if self.cuda is not None:
            major, minor = self.cuda.version
            say(f"CUDA kernels: {', '.join(self.cuda.architectures)}, by {self.cuda.nvcc} ({major}.{minor})")
        super().run()

    def get_ext_filename(self, name: str) -> str:
        # The library holds no Python: torch loads it, by this plain name.
        return f"{name.replace('.', '/')}.so"

    def build_extension(self, extension: Extension) -> None:
        from ninja import ninja_syntax

        folder = Path(self.build_temp).resolve() / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(extension.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=10_000)
            self.write_ops(writer, folder, out)
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
        names = [name for name in self.variants if name != "baseline"] + [f"int8_{name}" for name in self.int8_variants]
        return [f"-DBIASLOSS_WITH_{name.upper()}" for name in names]

    def write_rules(
        self, writer: object, cxx_flags: list[str], nvcc_flags: list[str], linker: list[str], libraries: list[str]
    ) -> None:
        compilers = {"cxx": [*self.cxx, *cxx_flags]}
        if self.cuda is not None:
            compilers["nvcc"] = [self.cuda.nvcc, *nvcc_flags]
        for name, command in compilers.items():
            writer.rule(
                name,
                shlex.join(command) + " $flags -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $what",
            )
        writer.rule(
            "link", f"{shlex.join(linker)} -shared -o $out $in {shlex.join(libraries)}", description="link $out"
        )

    def write_ops(self, writer: object, folder: Path, out: Path) -> None:
        includes = [f"-I{path}" for path in include_paths("cpu")]
        common = [*STABLE_ABI, *includes]
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
        rules = {".cpp": "cxx"} if self.cuda is None else {".cpp": "cxx", ".cu": "nvcc"}
        for source in sorted(path for path in CSRC.rglob("*") if path.suffix in rules):
            what = str(source.relative_to(CSRC))
            for name, flags in self.copies_of(source).items():
                objects += writer.build(
                    str(folder / f"{what}{name and f'.{name}'}.o"),
                    rules[source.suffix],
                    str(source),
                    variables={"flags": shlex.join(flags).replace("$", "$$"), "what": f"{what} {name}".strip()},
                )
        writer.build(str(out), "link", objects)

    def copies_of(self, source: Path) -> dict[str, list[str]]:
        """The names of the copies of a source that are compiled, with the flags of each."""
        if source.name == "build_facts.cpp":
            return {"": [f'-DBIASLOSS_{name}="{value}"' for name, value in self.build_facts().items()]}
        if source.name == "library.cpp":
            return {"": [] if self.cuda is None else ["-DBIASLOSS_WITH_CUDA"]}
        common = ["-ffp-contract=fast", "-fno-math-errno"]
        if source.name.endswith("_int8.cpp"):
            return {name: [f"-DBIASLOSS_ISA={name}", *common, *flags] for name, flags in self.int8_variants.items()}
        if not source.name.endswith("_simd.cpp"):
            return {"": []}
        # In development the portable copy is for tests alone: -O3 takes twice the time to compile.
        level = {"baseline": ["-O2"]} if self.development and len(self.variants) > 1 else {}
        return {
            name: [f"-DBIASLOSS_ISA={name}", *common, *level.get(name, []), *flags]
            for name, flags in self.variants.items()
        }

    def build_facts(self) -> dict[str, str]:
        """What ``biasloss info`` shows."""
        return {
            "VERSION": self.distribution.get_version(),
            "BUILT_WITH_TORCH": torch.__version__,
            "COMPILER": output_of(*self.cxx, "--version").splitlines()[0],
            "CPU_VARIANTS": ";".join(self.variants),
            "CUDA_VERSION": "" if self.cuda is None else ".".join(map(str, self.cuda.version)),
            "CUDA_ARCHITECTURES": "" if self.cuda is None else ";".join(self.cuda.architectures),
        }


class BuildWheel(bdist_wheel):
    """One wheel for every Python: the library has none in it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("biasloss_ext._ops", [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.cpp"))])],
    cmdclass={"build_ext": Build, "bdist_wheel": BuildWheel},
)
