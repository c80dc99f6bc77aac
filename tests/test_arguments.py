"""No function takes more than eight arguments, but where something outside it dictates them."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from biasloss_ext.ops.registry import OPS

ROOT = Path(__file__).parent.parent
MOST = 8
# Public functions and layers, whose options users give by name.
PUBLIC = {
    "biasloss_ext/functional.py": {"bias_loss"},
    "biasloss_ext/loss.py": {"FusedBiasLoss.__init__"},
    "biasloss_ext/weighting.py": {"weighted_cross_entropy"},
    "biasloss_ext/nn/depthwise_conv.py": {"DepthwiseConv2d.__init__"},  # as torch.nn.Conv2d
    "biasloss_ext/recipes/commands.py": {"diversity"},  # the options of a command
    "tests/oracle.py": {"bias_loss"},  # as that of functional.py
}
# Names of arguments that functions on the way to an op add to those of its schema.
BESIDE_SCHEMA = {"backend", "dilation"}


def tracked(*patterns: str) -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


SCHEMAS = [{argument.name for argument in op.native._schema.arguments} | BESIDE_SCHEMA for op in OPS.values()]


def python_functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = f"{within}{getattr(node, 'name', '')}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from python_functions(node, f"{name}." if isinstance(node, ast.ClassDef) else within)


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef, starred: bool = True) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *((given.vararg, given.kwarg) if starred else ())]
    return [argument.arg for argument in every if argument is not None and argument.arg not in ("self", "cls")]


def too_many_in_python(name: str, text: str) -> list[str]:
    found = []
    for function, node in python_functions(ast.parse(text)):
        arguments = arguments_of(node)
        # A constant of Triton cannot stand in a structure.
        of_triton = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        by_schema = any({*arguments_of(node, starred=False)} <= names for names in SCHEMAS)
        if len(arguments) > MOST and not of_triton and not by_schema and function not in PUBLIC.get(name, ()):
            found.append(f"{name}:{node.lineno}: {function} takes {len(arguments)} arguments")
    return found


# An implementation of an op for one device, or a CUDA kernel, whose launch takes no more than what its `<<<` does.
OF_SCHEMA = re.compile(rf"(?:{'|'.join(OPS)})_(?:cpu|cuda)")
NOT_FUNCTIONS = {"if", "for", "while", "switch", "return", "sizeof", "alignas", "catch", "asm", "__asm__"}


def too_many_in_cpp(name: str, text: str) -> list[str]:
    """Definitions, and types of pointers to functions, by the commas of their parameters."""
    found = []
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", lambda comment: " " * len(comment[0]), text, flags=re.S)
    for match in re.finditer(r"(?:\b(\w+)|\(\*(\w+)\))\s*(?=\()", text):
        function = match[1] or match[2]
        end, count, of_schema = match.end() + 1, 1, OF_SCHEMA.fullmatch(function)
        depth = angles = 0
        while end < len(text) and (text[end] != ")" or depth):
            depth += (text[end] in "([{") - (text[end] in ")]}")
            angles = max(0, angles + (text[end] == "<") - (text[end] == ">" and text[end - 1] != "-"))
            count += text[end] == "," and depth == 0 and angles == 0
            end += 1
        is_definition = re.match(r"\)\s*(?:const\s*)?(?:noexcept\s*)?(?::[^;{]*)?\{", text[end:])
        if count > MOST and (is_definition or match[2]) and not of_schema and function not in NOT_FUNCTIONS:
            found.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {function} takes {count} arguments")
    return found


def test_python() -> None:
    files = tracked("*.py")
    assert len(files) > 300
    assert [line for name in files for line in too_many_in_python(name, (ROOT / name).read_text())] == []


def test_cpp() -> None:
    files = tracked("*.h", "*.cpp", "*.cu", "*.cuh")
    assert len(files) > 100
    assert [line for name in files for line in too_many_in_cpp(name, (ROOT / name).read_text())] == []


def test_exceptions_are_needed() -> None:
    """An exception that no function needs any more would hide the next one of that name."""
    for name, functions in PUBLIC.items():
        known = dict(python_functions(ast.parse((ROOT / name).read_text())))
        assert [function for function in functions if len(arguments_of(known[function])) <= MOST] == []


def test_both_counters_count() -> None:
    names = ", ".join(f"a{number}" for number in range(9))
    assert len(too_many_in_python("x.py", f"class A:\n    def f(self, {names}): ...\ndef g({names[:-4]}): ...")) == 1
    parameters = ", ".join(f"std::pair<int, int> a{number}" for number in range(9))
    text = (
        f"void f({parameters}) {{}}\nvoid (*p)({parameters});\nT depthwise_cpu({parameters}) {{}}\nint x = g({names});"
    )
    assert [line.split()[1] for line in too_many_in_cpp("x.cpp", text)] == ["f", "p"]
