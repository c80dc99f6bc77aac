"""What holds for every op in the registry, by the samples of `samples.py`; a new op is tested here without a word about it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from biasloss_ext.ops import FAMILIES, maps
from biasloss_ext.ops.registry import OPS, families
from tests import oracle
from tests.calls import Call, in_a_tuple
from tests.ops import samples

EMPTY = inspect.Parameter.empty
UNKNOWN = (-1, maps.LAST_ACTIVATION + 1, 99)
LAST = f"{maps.LAST_ACTIVATION} ({maps.Activation(maps.LAST_ACTIVATION).name.lower()})"


def test_every_op_has_samples() -> None:
    assert [name for name in OPS if not samples.has(name)] == []


def test_every_op_belongs_to_a_family() -> None:
    assert {op.family for op in OPS.values()} == set(FAMILIES)
    assert {op.name for ops in families().values() for op in ops} == set(OPS)


def parameters_of(function: Callable[..., Any]) -> dict[str, tuple[bool, Any]]:
    """Whether each parameter is keyword-only, and its default. The options of a normalization, which implementations hand on,
    are those of `maps`."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            assert name in ("norm", "back"), f"**{name} of {function.__name__} hands on unknown options"
            of_maps = maps.Norm if name == "norm" else maps.Back
            found |= {name: (True, default) for name, default in of_maps._field_defaults.items()}
        else:
            found[name] = (parameter.kind is parameter.KEYWORD_ONLY, parameter.default)
    return found


def parameters_of_schema(name: str) -> dict[str, tuple[bool, Any]]:
    arguments = OPS[name].native._schema.arguments
    return {a.name: (a.kwarg_only, a.default_value if a.has_default_value() else EMPTY) for a in arguments}


@pytest.mark.parametrize("name", OPS)
def test_reference_and_schema_have_the_same_parameters(name: str) -> None:
    declared, found = parameters_of_schema(name), parameters_of(OPS[name].reference)
    assert found == declared
    positional = [[n for n, (keyword_only, _) in p.items() if not keyword_only] for p in (found, declared)]
    assert positional[0] == positional[1]


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.triton is not None])
def test_triton_and_schema_have_the_same_parameters(name: str) -> None:
    pytest.importorskip("triton")
    op = OPS[name]
    assert op.triton is not None
    assert str(op.triton._schema).replace("_triton(", "(") == str(op.native._schema)
    declared, found = parameters_of_schema(name), parameters_of(op._import_triton())
    assert found == declared
    positional = [[n for n, (keyword_only, _) in p.items() if not keyword_only] for p in (found, declared)]
    assert positional[0] == positional[1]


@pytest.mark.parametrize("name", OPS)
def test_the_shape_function_takes_what_the_schema_has(name: str) -> None:
    declared = parameters_of_schema(name)
    for parameter in inspect.signature(OPS[name].fake).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert declared[parameter.name][1] == parameter.default, parameter.name


@pytest.mark.parametrize(("name", "backend"), samples.runs(kernels=True))
def test_schema_and_shape_functions(name: str, backend: str) -> None:
    checks = ("test_schema", "test_faketensor")
    for dtype in (torch.float32, torch.bfloat16):
        for call in samples.of(name, dtype):
            arguments, options = call.arguments, call.options
            torch.library.opcheck(samples.overload(name, backend), arguments, options, test_utils=checks)


@pytest.mark.parametrize(("name", "backend"), samples.runs(kernels=True))
def test_traced_with_symbolic_shapes(name: str, backend: str) -> None:
    call = samples.of(name)[0]
    checks = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(samples.overload(name, backend), call.arguments, call.options, test_utils=checks)


def outcome(function: Callable[..., Any], call: Call, **options: Any) -> list[torch.Tensor]:
    """The outputs, and what the op wrote."""
    call = call.fresh()
    written = [t for name, t in call.options.items() if name.startswith("running_")]
    return [*in_a_tuple(call(function, **options)), *(t for t in written if t is not None)]


def strides(t: torch.Tensor) -> list[int]:
    """Of the dimensions where a stride says anything."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


@pytest.mark.parametrize(("name", "backend"), samples.runs())
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_agrees_with_float64(name: str, backend: str, dtype: torch.dtype) -> None:
    """Called as the layers do, and through `torch.ops`."""
    op = OPS[name]
    for call in samples.of(name, dtype):
        ours = outcome(op, call, backend=backend)
        exact = outcome(op.reference, call.to(torch.float64))
        rough = outcome(op.reference, call)
        for index, (mine, truth, own) in enumerate(zip(ours, exact, rough, strict=True)):
            assert mine.shape == own.shape
            assert mine.dtype == own.dtype
            assert strides(mine) == strides(own)
            largest = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
            # Triton's products have factors of the maps' dtype.
            of_factors = 5 * torch.finfo(dtype).eps * largest if backend == "triton" and dtype.itemsize == 2 else 0.0
            what = f"{name}, output {index}"
            oracle.assert_as_close_as_torch(mine, truth, own, 4 * largest, what, of_factors)
        if backend != "reference":
            through = outcome(samples.overload(name, backend), call)
            assert all(torch.equal(a, b) for a, b in zip(ours, through, strict=True))


def may_update(name: str) -> bool:
    arguments = OPS[name].native._schema.arguments
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)


@pytest.mark.parametrize(("name", "backend"), [run for run in samples.runs(kernels=True) if may_update(run[0])])
def test_compiled_by_inductor(name: str, backend: str) -> None:
    """With arguments that the op updates, and without."""
    calls = samples.of(name)

    def function(*arguments: Any, **options: Any) -> Any:
        return OPS[name](*arguments, backend=backend, **options)

    for call in (calls[0], calls[-1]):
        torch._dynamo.reset()
        found = outcome(torch.compile(function, fullgraph=True), call)
        for compiled, eager in zip(found, outcome(function, call), strict=True):
            assert torch.equal(compiled, eager)


def activations_of(name: str) -> list[str]:
    return [argument.name for argument in OPS[name].native._schema.arguments if argument.name.endswith("activation")]


WITH_ACTIVATIONS = [run for run in samples.runs() if activations_of(run[0])]


@pytest.mark.parametrize(("name", "backend"), WITH_ACTIVATIONS)
@pytest.mark.parametrize("number", UNKNOWN)
def test_an_unknown_activation_is_an_error(name: str, backend: str, number: int) -> None:
    for option in activations_of(name):
        call = samples.of(name)[0].but(**{option: number})
        with pytest.raises(
            ValueError, match=rf"unknown {option} {number}; supported: 0 \(identity\), .* {re.escape(LAST)}"
        ):
            call(OPS[name], backend=backend)


@pytest.mark.parametrize(("name", "backend"), [run for run in WITH_ACTIVATIONS if run[1] != "reference"])
@pytest.mark.parametrize("number", UNKNOWN)
def test_an_unknown_activation_is_an_error_through_torch_ops(name: str, backend: str, number: int) -> None:
    overload = samples.overload(name, backend)
    for option in activations_of(name):
        call = samples.of(name)[0].but(**{option: number})
        with pytest.raises((RuntimeError, ValueError), match=rf"(?s){option}.*{number}") as caught:
            call(overload)
        assert "0 (identity)" in str(caught.value) and LAST in str(caught.value)


def test_activations_are_found() -> None:
    """Of the ops that have any, all take them under names by which they are found here."""
    found = {name: activations_of(name) for name in OPS}
    assert found["pointwise"] == ["activation", "output_activation"]
    assert found["squeeze_excite_backward"] == ["activation", "gate_activation"]
    assert found["depthwise_backward"] == ["y_activation", "activation"]
    assert found["channel_gram"] == []
